"""What recovery makes small, handed to the model: the answers' loss, mixed with the distance from the dense model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from lvlm_prune.recovery.distillation import Teacher
from lvlm_prune.recovery.optimization import Optimization


@dataclass
class RecoveryObjective:
    """The `Objective` of recovery.

    Args:
        optimization: Learning rate, its schedule, what is kept for backward.
        teacher: What the dense model says before each answer token; None: the answers alone count.
    """

    optimization: Optimization = field(default_factory=Optimization)
    teacher: Teacher | None = None

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks run once more in backward."""
        return self.optimization.gradient_checkpointing

    def divergence(self, logits: Tensor, samples: list[int]) -> Tensor | None:
        """Divergence from the dense model; None without a teacher."""
        return None if self.teacher is None else self.teacher.divergence(logits, samples)

    def mixed(self, loss: Tensor, divergence: Tensor) -> Tensor:
        """The loss that training makes small: cross-entropy and divergence by their weights."""
        assert self.teacher is not None
        return self.teacher.options.mixed(loss, divergence)

    def optimizers(self, parameters: Iterable[Parameter], steps: int) -> dict[str, Any]:
        """What `configure_optimizers` returns."""
        return self.optimization.build(parameters, steps)
