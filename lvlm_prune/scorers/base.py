"""The interface of a scorer."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lvlm_prune.patterns import Group, Pattern
from lvlm_prune.statistics import Statistic


class Scorer(ABC):
    """How important each weight of a Linear is. Subclass it, write `score`, name the class in YAML.

    A scorer that also changes the remaining weights overrides `prune` and sets `updates_weights`.

    Example:
        >>> import torch
        >>> from lvlm_prune.patterns import Unstructured
        >>> class SignedScorer(Scorer):
        ...     def score(self, weight, statistic):
        ...         return weight.float()
        >>> SignedScorer().prune(torch.tensor([[-1.0, 2.0]]), None, 0.5, Unstructured())
        (tensor([[0., 2.]]), tensor([[ True, False]]))
    """

    statistic: ClassVar[type[Statistic] | None] = None
    """The sums that `score` needs of a Linear's input; None where weights are enough."""
    updates_weights: ClassVar[bool] = False
    """True where `prune` changes weights that stay; else the writer checks that they are byte-identical."""
    group: Group = "row"
    """What is compared with what under the unstructured pattern."""

    @abstractmethod
    def score(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Importance of each weight, float32 of shape (C_out, C_in).

        Args:
            weight: The Linear's weight, shape (C_out, C_in), in the model's dtype.
            statistic: The sums over the pool of this Linear's input site; None when `statistic` is None.
        """

    def prune(
        self, weight: Tensor, statistic: Statistic | None, sparsity: float, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """The new weight, same shape and dtype as the dense one, with +0.0 where the mask is True; and the mask."""
        mask = pattern.mask(self.score(weight, statistic), sparsity, self.group)
        return weight.masked_fill(mask, 0.0), mask
