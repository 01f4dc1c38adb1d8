"""Recovery on the block loop of `prune`: one block in memory at a time, no backward through the model."""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.data import CalibrationBatch
from lvlm_prune.data.recovery import SAMPLE_NUMBER
from lvlm_prune.distributed.launching import Launch
from lvlm_prune.errors import InputError
from lvlm_prune.loop import BlockLoop
from lvlm_prune.loop.activations import SampleRow
from lvlm_prune.loop.catching import CaughtSamples, catch_batch
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import RECOVERY_RECORD
from lvlm_prune.output.own_files import records_of, refuse_changed
from lvlm_prune.recovery.masks import StoredMasks
from lvlm_prune.runs.recover.run import BLOCKS, SCORING, RecoveryRun
from lvlm_prune.runs.session import ended

_RECONSTRUCTING = "reconstructing"


class BlockwiseRun(RecoveryRun):
    """The method `blockwise`; see `BlockwiseReconstruction`."""

    def _check_options(self) -> None:
        if self.run.hardware.world_size > 1:
            raise InputError("trainer.devices", self.run.hardware.world_size, "method blockwise runs on one device")
        if self.recovery.optimization.gradient_checkpointing:
            raise InputError("optimization.gradient_checkpointing", True, "does nothing with --method blockwise")

    def _check(self, earlier: Manifest | None) -> None:
        super()._check(earlier)
        from lvlm_prune.recovery.dense import open_dense_weights

        assert self.dense is not None
        device = self.run.hardware.device
        self.dense_weights = open_dense_weights(self.dense, self.model, device)

    def _begin(self, earlier: Manifest | None) -> None:
        self.record["blocks"] = []
        if earlier is not None and earlier.get("status") in (_RECONSTRUCTING, SCORING):
            assert self.model.folder is not None
            self.model.folder.refuse_other_layout(self.folder)
            done = earlier.get("blocks", [])
            self.record |= {"status": _RECONSTRUCTING, "blocks": done, "files": earlier.get("files", {})}
            blocks = (block for block in done if "adapters" in block)
            written = {f"{BLOCKS}/{block['index']:04}.safetensors": block["adapters"] for block in blocks}
            refuse_changed(self.folder, {**self.record["files"], **written})
            return
        super()._begin(earlier)
        self._copy_base().sync()
        (self.folder / BLOCKS).mkdir(exist_ok=True)
        self.record["status"] = _RECONSTRUCTING
        self.record.write(self.folder, RECOVERY_RECORD)

    def _train(self) -> None:
        from lvlm_prune.callbacks import BlockwiseReconstruction

        trainer, run, model = self.trainer, self.run, self.model
        assert self.lora is not None
        assert model.folder is not None
        clock = time.perf_counter()
        written = model.folder.at(self.folder)
        fitting = BlockwiseReconstruction(
            self.lora,
            self.recovery.reconstruction,
            self.recovery.optimization,
            self.pruned_names,
            self.dense_weights,
            written,
            self.folder / BLOCKS,
            set(self.datamodule.validation_indices),
        )
        callbacks = [*(one for one in trainer.callbacks if not isinstance(one, BlockwiseReconstruction)), fitting]
        fabric = Launch(run.hardware, callbacks).fabric
        run.callbacks = callbacks
        run.weights = StreamedWeights(model.model, model.runner.decoder, model.folder, fabric.device)

        def raise_hook(name: str, **arguments: Any) -> None:
            fabric.call(name, trainer=trainer, pl_module=model, **arguments)

        def load_done(index: int) -> None:
            fitting.pass_through(model, index)
            run.weights.load_block(index, written)

        run.samples = CaughtSamples(self._catch(fabric.device))
        raise_hook("setup", stage="recover")
        with ended(raise_hook, "recover"):
            raise_hook("on_prune_start")
            loop = BlockLoop(
                model.parts[-1],
                run.weights,
                run.samples.rows,
                raise_hook=raise_hook,
                gathers=lambda: False,
                needs=frozenset,
                agree=run.processes.agree,
                device=fabric.device,
            )
            loop.run(self.record.finished_blocks(), load_done)
            raise_hook("on_prune_end")
        self._summarise(time.perf_counter() - clock)

    def _catch(self, device: torch.device) -> list[SampleRow]:
        """Every sample at the input of the first block; training and validation samples share no batch."""
        data, weights = self.datamodule, self.run.weights
        weights.load_non_block_weights()
        rows: list[SampleRow] = []
        for numbers in (data.train_indices, data.validation_indices):
            for group in (group for batch in data.batches(numbers) for group in batch):
                inputs = {name: value for name, value in group.items() if name not in ("labels", SAMPLE_NUMBER)}
                batch = CalibrationBatch(inputs, group[SAMPLE_NUMBER].tolist(), [])
                rows += catch_batch(self.model, batch, device)
        weights.release_non_block_weights(any(row.batch.needs_token_embedding for row in rows))
        return rows

    def _adapter(self) -> dict[str, Tensor]:
        """The adapters of all blocks, from where they were written."""
        parts = sorted((self.folder / BLOCKS).glob("*.safetensors"))
        return {name: tensor for part in parts for name, tensor in load_file(part).items()}

    def _summarise(self, seconds: float) -> None:
        blocks = [block for block in self.record["blocks"] if "error_after" in block]
        errors = {
            name: sum(block[name] for block in blocks) / len(blocks) if blocks else None
            for name in ("error_before", "error_after")
        }
        self.record["training"] = {
            "trainable_parameters": sum(tensor.numel() for tensor in self._adapter().values()),
            "steps": sum(block["steps"] for block in blocks),
            "seconds": seconds,
        } | errors

    def _write(self) -> None:
        from lvlm_prune.recovery.adapter_folder import mask_digest, save_sparse_adapter

        assert self.lora is not None
        self._verify(StoredMasks(self.pruned_names, self.weights))
        if not self.record["verified"]["changed_linears"]:
            rate = self.recovery.optimization.learning_rate
            tried = f"with --optimization.learning_rate {rate:g} no block came nearer to the dense model"
            self._say(f"{tried}: every weight is what it was")
        tensors = self._adapter()
        adapted = [name for name in self.pruned_names if f"{name}.lora_A.weight" in tensors]
        if adapted:
            digests = {name: mask_digest(self.weights.stored(f"{name}.weight")) for name in adapted}
            config = self.lora.config(adapted)
            save_sparse_adapter(self.folder / "adapter", config, tensors, digests, self.lora.gradient, self.model.path)
            self.record["files"] |= records_of(self.folder, [self.folder / "adapter"])
        self._release()
