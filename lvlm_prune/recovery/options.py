"""How to recover, as a user asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lvlm_prune.recovery.distillation import Distillation
from lvlm_prune.recovery.optimization import Optimization
from lvlm_prune.recovery.reconstruction import Reconstruction

Method = Literal["lora", "full", "blockwise"]


@dataclass
class RecoveryOptions:
    """How to recover; see `LVLMTrainer.recover`."""

    method: Method = "lora"
    optimization: Optimization = field(default_factory=Optimization)
    dense: str = ""
    distillation: Distillation = field(default_factory=Distillation)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)

    def sections(self) -> dict[str, Any]:
        """What the method uses: section of the command line's configuration -> the object behind it."""
        used: dict[str, Any] = {"optimization": self.optimization}
        if self.method == "blockwise":
            return used | {"reconstruction": self.reconstruction}
        return used | {"distillation": self.distillation}

    @property
    def distils(self) -> bool:
        """Whether the loss asks the dense model."""
        return self.distillation.weight > 0

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model takes part."""
        return self.distils or self.method == "blockwise"
