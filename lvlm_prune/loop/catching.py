"""Catching: what comes before the first block runs once for each sample, which then waits at the block's input.

batches of this process ─► model up to block 0 ─► held ─► numbers, tokens and fingerprint over all processes
                           (non-block weights loaded)     (and released)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.blocks import CaughtBatch, Part, TowerRunner, Weights, modality_of_tokens
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.data import CalibrationBatch, CalibrationDataModule, fingerprint
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.data.picture import Picture, picture_of
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import RunError, first_line
from lvlm_prune.loop.activations import SampleRow, batches_of, fork_rows, row_of_tower, rows_of
from lvlm_prune.memory.run_memory import RunMemory
from lvlm_prune.memory.sizes import BatchSize
from lvlm_prune.methods.modality import IMAGE, MODALITIES, VIDEO
from lvlm_prune.module import LVLMModule

_NOT_FINITE = "NaN or infinity before the first block"


class NotFinite(RunError):
    """NaN or infinity reaches the first block: made of a sample by embeddings or a vision tower."""


@dataclass(frozen=True)
class CaughtSamples:
    """The samples of this process at the input of the first block.

    Args:
        rows: The samples.
        sizes: Sizes of their batches.
        numbers: Numbers of the samples of all processes, ascending.
        calibration: What the manifest says about them.
        picture: What one of them shows, for the report.
    """

    rows: list[SampleRow] = field(default_factory=list)
    sizes: list[BatchSize] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    picture: Picture | None = None

    def fork(self) -> CaughtSamples:
        """Copies that go their own way; these samples stay where they are."""
        return CaughtSamples(
            fork_rows(self.rows), list(self.sizes), list(self.numbers), copy.deepcopy(self.calibration), self.picture
        )


@dataclass(frozen=True)
class Catcher:
    """Catches this process' share of a calibration set.

    Args:
        model: The opened model.
        datamodule: The calibration set.
        device: Where the model runs.
        processes: All processes of the run.
        memory: Holds what is caught.
        visual: Modalities that count as visual tokens.
    """

    model: LVLMModule
    datamodule: CalibrationDataModule
    device: torch.device
    processes: Processes
    memory: RunMemory
    visual: list[str]

    def catch(self, part: Part, weights: Weights, written: CheckpointFolder | None = None) -> CaughtSamples:
        """Run everything before the first block of `part`; afterwards its weights are released.

        Args:
            part: The blocks at which the samples are to wait.
            weights: Those of `part`.
            written: Where what comes before `part` is pruned already; None: it is as it was.

        Raises:
            RunError: No sample can be read, or one cannot be caught.
        """
        rows: list[SampleRow] = []
        digests: dict[int, str] = {}
        tokens = torch.zeros(len(MODALITIES), dtype=torch.float64)
        picture: Picture | None = None
        error: BaseException | None = None
        config, in_tower = self.model.model.config, part.target == "vision"
        ranks = (self.processes.rank, self.processes.count)
        weights.load_non_block_weights(written)
        try:
            # In a tower nothing tells the images of several samples apart.
            batch_size = 1 if in_tower else None
            limits = ModelLimits.of(self.model.model)
            batches = self.datamodule.calibration_batches(
                self.model.processor, *ranks, batch_size=batch_size, limits=limits
            )
            taken = taken_batches(self.model, self.datamodule, batches, lambda one: self._catch_and_hold(one, part))
            for batch, caught in taken:
                rows += caught
                modality = modality_of_tokens(config, batch.inputs["input_ids"], batch.inputs.get("attention_mask"))
                tokens += torch.bincount(modality[modality >= 0], minlength=len(MODALITIES)).cpu()
                picture = picture or _first_picture(batch, modality, config)
                digests.update(zip(batch.indices, batch.digests, strict=True))
        except Exception as problem:
            error = problem
        self.processes.agree(error)
        weights.release_non_block_weights(not in_tower and any(row.batch.needs_token_embedding for row in rows))
        return self._of_all(rows, digests, tokens, picture)

    def _catch_and_hold(self, batch: CalibrationBatch, part: Part) -> list[SampleRow]:
        if in_tower := isinstance(part.runner, TowerRunner):
            rows = _catch_calls(self.model, part.runner, batch, self.device)
        else:
            rows = catch_batch(self.model, batch, self.device)
        size = BatchSize.of(batch.inputs, self.model.model.config, self.visual)
        for caught in batches_of(rows):
            self.memory.hold(caught, size.in_tower(caught.token_shape[1]) if in_tower else size)
        return rows

    def _of_all(
        self, rows: list[SampleRow], digests: dict[int, str], tokens: Tensor, picture: Picture | None
    ) -> CaughtSamples:
        """Put together what all processes caught; the samples themselves stay where they are."""
        processes, datamodule = self.processes, self.datamodule
        everywhere = {index: digest for part in processes.gather(digests) for index, digest in part.items()}
        numbers = sorted(everywhere)
        if not numbers:
            raise RunError("no calibration sample could be read; every one was skipped")
        shares = dict(zip(numbers, datamodule.sample_weights(numbers)))
        summed = processes.sum(tokens).tolist()
        calibration = {
            "num_samples": len(numbers),
            "fingerprint": fingerprint(everywhere[number] for number in numbers),
            "skipped": [item for part in processes.gather(datamodule.skipped) for item in part],
            "tokens": {name: int(count) for name, count in zip(MODALITIES, summed) if count},
        }
        pictures = [one for one in processes.gather(picture) if one is not None]
        return CaughtSamples(
            [replace(row, weight=shares[row.sample]) for row in rows],
            self.memory.sizes,
            numbers,
            calibration,
            min(pictures, key=lambda one: one.sample, default=None),
        )


def taken_batches(
    model: LVLMModule,
    datamodule: CalibrationDataModule,
    batches: Iterable[CalibrationBatch],
    catch: Callable[[CalibrationBatch], list[SampleRow]],
) -> Iterator[tuple[CalibrationBatch, list[SampleRow]]]:
    """Each batch with its samples; one that the model itself cannot do with counts as one that cannot be read.

    Whether image features and the tokens that stand for them match, whether a number overflows, and much else, only the
    model's code knows.

    Args:
        model: The opened model.
        datamodule: Where the batches come from.
        batches: The batches.
        catch: Gives the samples of a batch at the input of the first block.

    Raises:
        RunError: The model refuses a sample, or makes NaN or infinity of it, and none is to be left out.
    """
    for batch in batches:
        try:
            rows = catch(batch)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, IndexError, RuntimeError, TypeError, KeyError, NotFinite) as error:
            if len(batch) == 1:
                said = _NOT_FINITE if isinstance(error, NotFinite) else f"the model refuses it: {first_line(error)}"
                datamodule.leave_out(batch.indices[0], said)
            else:  # which one it is shows when each comes alone
                alone = datamodule.one_by_one(batch.indices, model.processor, ModelLimits.of(model.model))
                yield from taken_batches(model, datamodule, alone, catch)
            continue
        yield batch, rows


@torch.no_grad()
def catch_batch(model: LVLMModule, batch: CalibrationBatch, device: torch.device) -> list[SampleRow]:
    """The samples of a batch at the input of the decoder's first block; the non-block weights are loaded.

    Raises:
        NotFinite: NaN or infinity is what reaches the block.
    """
    caught = model.runner.catch(_on_device(model, batch, device))
    _refuse_not_finite(caught, batch)
    return rows_of(caught, model.model.config, batch.indices)


@torch.no_grad()
def _catch_calls(
    model: LVLMModule, runner: TowerRunner, batch: CalibrationBatch, device: torch.device
) -> list[SampleRow]:
    """Every call of a vision tower for a batch of one sample, at the input of the tower's first block."""
    calls = runner.catch_calls(_on_device(model, batch, device))
    for caught, _ in calls:
        _refuse_not_finite(caught, batch)
    return [row_of_tower(caught, batch.indices[0], modality) for caught, modality in calls]


def _on_device(model: LVLMModule, batch: CalibrationBatch, device: torch.device) -> dict[str, Tensor]:
    return {
        name: value.to(device, model.compute_dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.inputs.items()
    }


def _refuse_not_finite(caught: CaughtBatch, batch: CalibrationBatch) -> None:
    if not torch.isfinite(caught.hidden).all():
        samples = ", ".join(map(str, batch.indices))
        raise NotFinite(f"{_NOT_FINITE} for calibration sample {samples}")


def _first_picture(batch: CalibrationBatch, modality: Tensor, config: Any) -> Picture | None:
    """Of the samples of a batch, the first one whose visual tokens have known places."""
    for number, sample in enumerate(batch.indices):
        images, videos = (int((modality[number] == code).sum()) for code in (IMAGE, VIDEO))
        found = None if videos else picture_of(batch.inputs, number, sample, images, config)
        if found is not None:
            return found
    return None
