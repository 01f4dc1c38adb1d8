"""Frozen masks: what was pruned stays pruned, in every kind of training.

trainer = L.Trainer(callbacks=[FrozenMasks()])      # full fine-tuning of the pruned Linears, or beside `SparseLoRA`
"""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lvlm_prune.methods.patterns import Pattern
from lvlm_prune.recovery.masks import ZeroMask, load_pruned, verify_zeros
from lvlm_prune.recovery.objective import RecoveryObjective

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule


class FrozenMasks(Callback):
    """Keeps the zeros of pruned Linears, and verifies them at the start, at every checkpoint and at the end.

    Where a pruned weight is itself trained, its gradient is zero; then no optimizer that moves a weight by a multiple
    of its gradients' history moves it, and weight decay leaves zero at zero. Verification does not rely on that: a
    pruned entry that is not exactly +0.0 stops the run and names the Linear.
    """

    def __init__(self) -> None:
        self.masks: dict[str, ZeroMask] = {}
        self._hooks: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: "LVLMModule", stage: str) -> None:  # type: ignore[override]
        """Note where the zeros are."""
        if stage != "fit":
            return
        load_pruned(pl_module)
        pl_module.objective = pl_module.objective or RecoveryObjective()
        if not self.masks:
            self.masks = {name: ZeroMask(linear.weight) for name, linear in pl_module.pruned.items()}

    def on_train_start(self, trainer: Trainer, pl_module: "LVLMModule") -> None:  # type: ignore[override]
        """Verify, also what a checkpoint brought back; hold the gradient of trained weights at zero where they are."""
        self.verify(pl_module)
        for linear in pl_module.pruned.values():
            if linear.weight.requires_grad:
                self._hooks.append(linear.weight.register_hook(_masked_by(linear.weight)))

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, pl_module: "LVLMModule", checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a training checkpoint in which a pruned weight is not zero."""
        self.verify(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: "LVLMModule") -> None:  # type: ignore[override]
        """Verify that every pruned weight is zero; gradients are free again."""
        self.verify(pl_module)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def verify(self, pl_module: "LVLMModule", pattern: Pattern | None = None) -> None:
        """Hold every pruned weight against its zeros.

        Raises:
            RunError: A pruned entry is not exactly +0.0; names the Linear.
        """
        for name, mask in self.masks.items():
            verify_zeros(name, mask, pl_module.pruned[name].weight, pattern)


def _masked_by(weight: Tensor) -> Any:
    # Not a method of anything: the hook would keep more alive than the weight.
    return lambda gradient: gradient.masked_fill(weight.detach() == 0, 0)
