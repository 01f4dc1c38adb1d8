"""Sparse LoRA: adapters on the pruned Linears whose update never touches a pruned weight.

trainer = RunTrainer(callbacks=[SparseLoRA(rank=8)])
trainer.recover(LVLMModule("runs/my-pruned-model"), RecoveryDataModule(), output="runs/recovered")
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lvlm_prune.errors import InputError
from lvlm_prune.recovery.masked_lora import Gradient
from lvlm_prune.recovery.masks import load_pruned
from lvlm_prune.seeds import dropout_seed

if TYPE_CHECKING:
    from peft import LoraConfig

    from lvlm_prune.module import LVLMModule


class SparseLoRA(Callback):
    """Trains W + [W != 0] * (B A) * alpha / rank in every pruned Linear; W itself stays as it is.

    Args:
        rank: Rank r of the update.
        alpha: Its scale is alpha / rank.
        dropout: Share of a Linear's inputs that its update does not see in training.
        targets: Glob pattern, or list of them, on module paths, for example `*.mlp.*`. One that matches no pruned
            Linear is an error.
        gradient: `exact`, or `straight_through`: cheaper, with gradients of A and B that leave the mask out.
        seed: Seed of A's first values and of the dropout; B begins at zero.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: list[str] | str = "*",
        gradient: Gradient = "exact",
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise InputError("lora.rank", rank, "must be at least 1")
        if not alpha > 0:
            raise InputError("lora.alpha", alpha, "must be positive")
        if not 0 <= dropout < 1:
            raise InputError("lora.dropout", dropout, "must lie in [0, 1)")
        if gradient not in ("exact", "straight_through"):
            raise InputError("lora.gradient", gradient, "must be exact or straight_through")
        if seed < 0:
            raise InputError("lora.seed", seed, "must not be negative")
        self.rank, self.alpha, self.dropout, self.gradient, self.seed = rank, alpha, dropout, gradient, seed
        self.targets = [targets] if isinstance(targets, str) else list(targets)

    def select(self, pruned: Iterable[str]) -> list[str]:
        """Paths of the Linears that get an adapter.

        Args:
            pruned: Paths of all pruned Linears.

        Raises:
            InputError: A pattern matches no pruned Linear.
        """
        pruned = list(pruned)
        for pattern in self.targets:
            if not any(fnmatchcase(name, pattern) for name in pruned):
                raise InputError("lora.targets", pattern, "matches no pruned Linear of the decoder blocks")
        return [name for name in pruned if any(fnmatchcase(name, pattern) for pattern in self.targets)]

    def config(self, selected: list[str]) -> "LoraConfig":
        """What PEFT is to know about the adapters of these Linears."""
        from lvlm_prune.recovery.adapter_layer import sparse_lora_config

        return sparse_lora_config(
            self.gradient,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=selected,
        )

    def setup(self, trainer: Trainer, pl_module: "LVLMModule", stage: str) -> None:  # type: ignore[override]
        """Inject the adapters, before the optimizer is made."""
        if stage == "fit" and not pl_module.adapted:
            load_pruned(pl_module)
            self.inject(pl_module)

    def inject(self, pl_module: "LVLMModule") -> None:
        """Put an adapter on each selected Linear of a loaded model; nothing else is trainable afterwards."""
        from peft import inject_adapter_in_model

        from lvlm_prune.recovery.adapter_layer import SparseLoraLinear

        selected = self.select(pl_module.pruned)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            inject_adapter_in_model(self.config(selected), pl_module.model)
        layers = {
            path: module for path, module in pl_module.model.named_modules() if isinstance(module, SparseLoraLinear)
        }
        pl_module.adapted = {name: layers[name] for name in selected}
        for layer in layers.values():
            layer.prepare_to_train()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Dropout follows from the number of the batch: a resumed run draws what an uninterrupted one would."""
        if self.dropout:
            seen = trainer.fit_loop.epoch_loop.total_batch_idx
            torch.manual_seed(dropout_seed(self.seed, seen, trainer.global_rank))
