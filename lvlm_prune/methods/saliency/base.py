"""The interface of a saliency."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lvlm_prune.methods.tokens import Tokens


class Saliency(ABC):
    """How much each visual token matters at a block. Subclass it, write `__call__`, and name the class in YAML.

    Example:
        >>> import torch
        >>> class NormSaliency(Saliency):
        ...     def __call__(self, tokens):
        ...         return tokens.hidden_out[tokens.visual].float().norm(dim=-1)
        >>> tokens = Tokens(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([False, True]))
        >>> NormSaliency()(tokens)
        tensor([5.])
    """

    name: ClassVar[str] = "saliency"
    """Key under which `--pruning.record` writes the values."""
    needs: frozenset[str] = frozenset()
    """Optional fields of `Tokens` that the saliency looks at, of `methods.tokens.NEEDS`; others stay None."""
    maximum: ClassVar[float] = math.inf
    """Largest possible value; bounds how many candidates an adaptive pool has to hold."""

    @abstractmethod
    def __call__(self, tokens: Tokens) -> Tensor:
        """Saliency of each visual token, float32 of shape (n_visual,); larger is more salient."""

    def ranking(self, tokens: Tokens, saliency: Tensor, count: int) -> Tensor:
        """The first `count` visual tokens in the order in which they are chosen: indices into them, int64.

        By default the most salient first, ties by lowest index. A smaller `count` gives a prefix of the same order.
        """
        return saliency.argsort(descending=True, stable=True)[:count]
