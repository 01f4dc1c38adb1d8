"""Block-wise reconstruction: each block's adapters learn what the dense block puts out, and nothing else is in memory.

                 ┌─► dense block  ─► target         (its weights come, and go)
samples at block ┤                      │
                 └─► pruned block + adapters ─► squared error ─► backward through this block alone
                                            ─► merge ─► samples at the next block
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from lvlm_prune.blocks import BlockRunner, CaughtBatch, StreamedWeights
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.callbacks.sparse_lora import SparseLoRA
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.errors import RunError
from lvlm_prune.loop import Block
from lvlm_prune.loop.dense_path import DensePath
from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.own_files import record_of_content
from lvlm_prune.output.progress import Progress
from lvlm_prune.output.summaries import RECOVERY_RECORD
from lvlm_prune.recovery.masked_lora import masked_weight
from lvlm_prune.recovery.masks import ZeroMask, verify_zeros
from lvlm_prune.recovery.optimization import Optimization
from lvlm_prune.recovery.reconstruction import Reconstruction, squared_sums
from lvlm_prune.seeds import combined_seed, dropout_seed

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.recovery.adapter_layer import SparseLoraLinear
    from lvlm_prune.run import RunTrainer


class BlockwiseReconstruction(PruneCallback):
    """Fits, merges and writes the adapters of one block after the other.

    A block whose error on the samples for validation (on all, where there are none) did not fall stays as it was.

    Args:
        lora: What the adapters are like.
        options: Epochs, learning rate and inputs of the fit.
        optimization: Learning rate and its schedule, which begins anew at each block.
        pruned: Paths of all pruned Linears.
        dense: Streams the dense weights into the same model.
        written: The copy of the base that is overwritten.
        work: Folder for the adapters of finished blocks.
        validation: Numbers of the samples that are kept for validation.
    """

    def __init__(
        self,
        lora: SparseLoRA,
        options: Reconstruction,
        optimization: Optimization,
        pruned: list[str],
        dense: StreamedWeights,
        written: CheckpointFolder,
        work: Path,
        validation: set[int],
    ) -> None:
        self.lora, self.options, self.optimization = lora, options, optimization
        self.pruned, self.selected = pruned, set(lora.select(pruned))
        self.dense, self.written, self.work, self.validation = dense, written, work, validation
        self._adapters: dict[str, Tensor] = {}
        self._step = 0

    def on_prune_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Sort the batches by what they are for."""
        samples: dict[int, set[int]] = {}
        batches: dict[int, CaughtBatch] = {}
        for row in trainer.run.samples.rows:
            batches[id(row.batch)] = row.batch
            samples.setdefault(id(row.batch), set()).add(row.sample)
        held_out = {key for key, numbers in samples.items() if numbers <= self.validation}
        self._train = [batch for key, batch in batches.items() if key not in held_out]
        self._validation = [batch for key, batch in batches.items() if key in held_out] or self._train
        self._all = list(batches.values())
        # Copies would keep the samples at the first block in memory to the end.
        self._dense_path = DensePath(pl_module.runner, self._all if self._follows_dense else [])
        self._step = sum(entry["steps"] for entry in trainer.run.record["blocks"])
        per_block = len(self._all) + self.options.epochs * len(self._train)
        self._bar = Progress(
            "Reconstructing",
            per_block * len(pl_module.runner),
            initial=per_block * len(trainer.run.record["blocks"]),
            shown=trainer.progress_bar_callback is not None,
            leave=True,
        )

    @property
    def _follows_dense(self) -> bool:
        return self.options.inputs == "dense"

    def pass_through(self, pl_module: "LVLMModule", index: int) -> None:
        """Take the dense model's samples through a block that an earlier run finished."""
        if self._follows_dense:
            self.dense.load_block(index)
            self._dense_path.advance(index)

    def on_block_calibrated(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Ask the dense block, fit the adapters, merge them."""
        started = time.perf_counter()
        self._bar.describe(f"block {block.index + 1}/{len(pl_module.runner)}")
        targets = self._ask_dense(trainer, pl_module, block.index)
        names = {name: f"{block.name}.{name}" for name in block.linears if f"{block.name}.{name}" in self.pruned}
        adapted = {name: block.linears[name] for name, path in names.items() if path in self.selected}
        self._adapters, found = {}, {"steps": 0}
        train = [batch for batch in self._train if pl_module.runner.calls(block.index, batch)]
        if adapted and train:
            with _adapters_on(block.module, adapted, self.lora, block.index) as layers:
                found = self._fit(trainer, pl_module.runner, block, layers, train, targets)
                for name, layer in layers.items():
                    for part in ("lora_A", "lora_B"):
                        tensor = getattr(layer, part)["default"].weight
                        self._adapters[f"{names[name]}.{part}.weight"] = tensor.detach().cpu()
        self._merged = {}
        for name, path in names.items():
            self._merged[path] = merged = self._merge(trainer, path)
            # What the next blocks are given is what is written.
            block.linears[name].weight.data.copy_(merged)
        block.record.update(found | {"fit_seconds": time.perf_counter() - started})

    def on_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Write the block, then say so: a run that dies before that does the block again."""
        assert isinstance(trainer.run.weights, StreamedWeights)
        weights = {f"{path}.weight": merged for path, merged in self._merged.items()}
        for key, tensor in trainer.run.weights.to_disk(weights, self.written).items():
            self.written.write(key, tensor)
        self.written.sync()
        content = save(self._adapters)
        replace_durably(self.work / f"{block.index:04}.safetensors", content)
        block.record["adapters"] = record_of_content(content)
        trainer.run.record["blocks"].append({"index": block.index, "name": block.name} | block.record)
        trainer.run.record.write(self.written.path, RECOVERY_RECORD)

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Close the bar."""
        self._bar.close()

    def on_exception(self, trainer: "RunTrainer", pl_module: "LVLMModule", exception: BaseException) -> None:  # type: ignore[override]
        """Close the bar, so that the error stands on a line of its own."""
        if hasattr(self, "_bar"):
            self._bar.close()

    # ---- one block ---------------------------------------------------------------------------------------------------
    def _ask_dense(self, trainer: "RunTrainer", pl_module: "LVLMModule", index: int) -> dict[int, Tensor]:
        """What the dense block puts out for each batch; afterwards the pruned block is in memory again."""
        targets: dict[int, Tensor] = {}

        def keep(batch: CaughtBatch, output: Tensor) -> None:
            targets[id(batch)] = output
            self._bar.update(1)

        self.dense.load_block(index)
        if self._follows_dense:
            self._dense_path.advance(index, keep)
        else:
            for batch in self._all:
                keep(batch, pl_module.runner.run(index, batch))
        trainer.run.weights.load_block(index)
        return targets

    def _fit(
        self,
        trainer: "RunTrainer",
        runner: BlockRunner,
        block: Block,
        layers: Mapping[str, "SparseLoraLinear"],
        train: list[CaughtBatch],
        targets: Mapping[int, Tensor],
    ) -> dict[str, Any]:
        """Adapters that lower the error, and how far they did."""
        index = block.index
        validation = [batch for batch in self._validation if runner.calls(index, batch)] or train
        parameters = [parameter for layer in layers.values() for parameter in layer.parameters() if _trains(parameter)]
        total = self.options.epochs * len(train)
        built = self.optimization.build(parameters, total)
        optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
        before = self._error(runner, index, layers, validation, targets)
        order = torch.Generator().manual_seed(combined_seed(self.lora.seed, index))
        for _ in range(self.options.epochs):
            losses = []
            for place in torch.randperm(len(train), generator=order).tolist():
                batch = train[place]
                if self.lora.dropout:
                    torch.manual_seed(dropout_seed(self.lora.seed, self._step))
                with torch.enable_grad():  # the loop has them off
                    error, size = squared_sums(runner.run_with_gradients(index, batch), targets[id(batch)], batch)
                    loss = error / size
                loss.backward()
                if trainer.gradient_clip_val:
                    clip_grad_norm_(parameters, float(trainer.gradient_clip_val))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                self._step += 1
                self._bar.update(1)
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise RunError(f"NaN or infinity while {block.name} is fitted; lower --optimization.learning_rate")
            for logger in trainer.loggers:
                logger.log_metrics({"block": index, "train_error": mean}, step=self._step)
        after = self._error(runner, index, layers, validation, targets)
        for logger in trainer.loggers:
            logger.log_metrics({"block": index, "validation_error": after}, step=self._step)
        if not after < before:
            after = before
            for layer in layers.values():
                nn.init.zeros_(layer.lora_B["default"].get_parameter("weight"))
        return {"steps": total, "error_before": before, "error_after": after}

    @staticmethod
    def _error(
        runner: BlockRunner,
        index: int,
        layers: Mapping[str, "SparseLoraLinear"],
        batches: list[CaughtBatch],
        targets: Mapping[int, Tensor],
    ) -> float:
        """Squared error relative to what should come out."""
        for layer in layers.values():
            layer.eval()
        sums = [torch.stack(squared_sums(runner.run(index, batch), targets[id(batch)], batch)) for batch in batches]
        for layer in layers.values():
            layer.prepare_to_train()
        error, size = torch.stack(sums).double().sum(dim=0).tolist()
        return error / max(size, 1e-30)

    def _merge(self, trainer: "RunTrainer", path: str) -> Tensor:
        """The Linear's weight as it is going to be stored, on the CPU."""
        assert isinstance(trainer.run.weights, StreamedWeights)
        stored = trainer.run.weights.stored(f"{path}.weight")
        mask = ZeroMask(stored)
        merged = stored
        if f"{path}.lora_A.weight" in self._adapters:
            lora_a, lora_b = (self._adapters[f"{path}.{part}.weight"] for part in ("lora_A", "lora_B"))
            merged = masked_weight(stored, lora_a, lora_b, self.lora.alpha / self.lora.rank)
        merged = merged.masked_fill(stored == 0, 0.0)
        verify_zeros(path, mask, merged)
        if not merged.isfinite().all():
            raise RunError(f"NaN or infinity in {path} after it was fitted; lower --optimization.learning_rate")
        return merged


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


@contextmanager
def _adapters_on(
    module: nn.Module, linears: Mapping[str, nn.Linear], lora: SparseLoRA, index: int
) -> Iterator[dict[str, "SparseLoraLinear"]]:
    """Put an adapter on each of a block's Linears; afterwards the Linears are alone again."""
    from lvlm_prune.recovery.adapter_layer import sparse_lora_class

    config = lora.config(list(linears))
    layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(combined_seed(lora.seed, index))
        for name, linear in linears.items():
            layer = sparse_lora_class(lora.gradient)(linear, "default", config, r=lora.rank, lora_alpha=lora.alpha)
            layer.prepare_to_train()
            layers[name] = layer
    try:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
        yield layers
    finally:
        for name, linear in linears.items():
            module.set_submodule(name, linear)
