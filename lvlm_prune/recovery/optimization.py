"""How recovery optimises: AdamW with a warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lvlm_prune.errors import InputError

# Beyond it a step is more than float32 holds.
_HIGHEST_RATE = 1e30


@dataclass
class Optimization:
    """AdamW and its learning rate.

    Args:
        learning_rate: Largest learning rate.
        weight_decay: Decoupled weight decay.
        warmup: Share of all steps in which the learning rate rises linearly from zero, in [0, 1).
        schedule: What follows: `cosine` or `linear` to zero, or `constant`.
        gradient_checkpointing: Keep only the inputs of decoder blocks for backward, and run each block once more there.

    Raises:
        InputError: A number is out of range.

    Example:
        >>> schedule = Optimization(warmup=0.5, schedule="linear")
        >>> [schedule.factor(step, total=4) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError("optimization.learning_rate", self.learning_rate, "must be positive")
        if self.learning_rate > _HIGHEST_RATE:
            raise InputError("optimization.learning_rate", self.learning_rate, f"must be at most {_HIGHEST_RATE:g}")
        if not self.weight_decay >= 0:
            raise InputError("optimization.weight_decay", self.weight_decay, "must not be negative")
        if not 0 <= self.warmup < 1:
            raise InputError("optimization.warmup", self.warmup, "must lie in [0, 1)")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise InputError("optimization.schedule", self.schedule, "must be cosine, linear or constant")

    def factor(self, step: int, total: int) -> float:
        """Share of the largest learning rate at a step, counted from 0."""
        warmup = math.ceil(self.warmup * total)
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[
            self.schedule
        ]

    def build(self, parameters: Iterable[Parameter], total: int) -> dict[str, Any]:
        """What `configure_optimizers` returns, for `total` steps."""
        optimizer = AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        scheduler = LambdaLR(optimizer, lambda step: self.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
