"""The interface of a pool."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from lvlm_prune.methods.survey import SumOverProcesses, Surveyor
from lvlm_prune.methods.tokens import Selection, Tokens


class Pool(Surveyor, ABC):
    """Chooses the calibration tokens of each sample at a block. Subclass it, write `select`, name the class in YAML.

    Example:
        >>> import torch
        >>> class FirstHalfPool(Pool):
        ...     def select(self, tokens, linear=None):
        ...         return Selection(torch.arange(len(tokens.visual)) < len(tokens.visual) // 2)
        >>> FirstHalfPool().select(Tokens(torch.eye(4), torch.eye(4), torch.zeros(4, dtype=torch.bool))).weights
        tensor([ True,  True, False, False])
    """

    name: ClassVar[str] = "pool"
    """Key under which `--pruning.record` writes the tokens of a `per_linear` pool, `amia_sel.3.0.mlp.up_proj`."""
    per_linear: ClassVar[bool] = False
    """True for pools that choose anew for every Linear, usually from its outputs (`needs = {"outputs"}`)."""
    needs: frozenset[str] = frozenset()
    """Optional fields of `Tokens` that `select` looks at, of `lvlm_prune.methods.tokens.NEEDS`; others stay None."""
    needs_visual: ClassVar[bool] = False
    """True where a calibration set without any visual token makes no sense."""

    needs_text: bool = False
    """True where a calibration set without any text token makes no sense."""

    in_towers: ClassVar[bool] = False
    """True where it is defined for a vision tower, too, in which every token is visual."""

    @abstractmethod
    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Choose among the tokens of one sample.

        Args:
            tokens: The sample's real tokens at this block.
            linear: Name of the Linear, relative to the block, for `per_linear` pools; else None.
        """

    def select_each(self, tokens: Tokens, linears: Sequence[str]) -> dict[str, Selection]:
        """What `select` answers for each of some Linears, for `per_linear` pools.

        Override it where a pool looks at numbers of the device on the way: for all Linears at once a GPU waits once.
        """
        return {linear: self.select(tokens, linear) for linear in linears}

    def cutoffs(self, sum_over_processes: SumOverProcesses) -> list[int]:
        """How many candidates of each sample count, in the order in which this process saw the samples.

        Called once per block after all samples have run, on every process; ends the block. Pools that never return
        candidates need not override it.

        Args:
            sum_over_processes: Sums a float64 tensor over all processes (the identity with one).
        """
        return []

    def held_tokens(self, text: int, visual: int) -> int:
        """The most candidates that `select` returns for a sample of `text` and `visual` tokens, for the plan."""
        return 0

    def working_bytes(self, tokens: int, visual: int, width: int, widest: int, itemsize: int) -> int:
        """Bytes that `select` takes, for the plan.

        Args:
            tokens: Tokens of a sample.
            visual: Visual ones among them.
            width: Width of the hidden states.
            widest: Width of the widest Linear's output.
            itemsize: Bytes of one activation.
        """
        return 0

    def summary(self) -> dict[str, float]:
        """Numbers about the block just ended that belong in the manifest, for example the mean saliency."""
        return {}
