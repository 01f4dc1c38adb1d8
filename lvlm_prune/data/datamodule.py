"""The calibration set: which samples, in which batches, on which process.

data = CalibrationDataModule(LlavaJsonSource("share.json"), num_samples=128, seed=0)
data.setup()
for batch in data.calibration_batches(processor):
    model(**batch.inputs)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import lightning as L

from lvlm_prune.data.batches import CalibrationBatch, Inputs, batch_key, collate, digest
from lvlm_prune.data.conversation import Conversation, Document
from lvlm_prune.data.embedded import EmbeddedSource
from lvlm_prune.data.limits import NO_LIMITS, ModelLimits
from lvlm_prune.data.processing import encode, pad_token_of, padding_side_of, refusals
from lvlm_prune.data.source import CalibrationSource, Sample, sample_of
from lvlm_prune.errors import InputError, RunError, one_line, refuse_huge
from lvlm_prune.plugins import lazy_default, mounted, own_instance

log = logging.getLogger(__name__)

# Samples that are left out and get a line of their own on the screen.
_NAMED = 5
# Samples that stand by for each one to measure on, in case that it cannot be read.
_SPARE = 4
_WAY_OUT = "--data.on_error skip leaves samples out that cannot be read"


class CalibrationDataModule(L.LightningDataModule):
    """Deterministic choice of `num_samples` from a source, as batches of model inputs.

    What a sample becomes depends on the source, the seed and the model's processor, never on the batch size or on the
    number of processes.

    Args:
        source: Where samples come from.
        num_samples: Samples to take. Default: all there are in sets made for calibration, otherwise 128.
        seed: Another seed takes other samples.
        batch_size: Samples per forward.
        on_error: A sample that cannot be read ends the run (`raise`), or is left out and reported (`skip`).
        padding_side: Where shorter samples of a batch are padded, `left` or `right`; `auto`: where the processor's
            tokenizer does, and on the right where the samples are ready-made model inputs.
        max_pixels: Images with more pixels (width times height) are shrunk to so many, in their aspect ratio, before
            the processor sees them. Default: as they are.

    Raises:
        InputError: A value is out of range.
    """

    def __init__(
        self,
        source: CalibrationSource = lazy_default(EmbeddedSource),
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        padding_side: Literal["auto", "left", "right"] = "auto",
        max_pixels: int | None = None,
    ) -> None:
        super().__init__()
        if num_samples is not None and num_samples < 1:
            raise InputError("data.num_samples", num_samples, "must be at least 1")
        if batch_size < 1:
            raise InputError("data.batch_size", batch_size, "must be at least 1")
        if seed < 0:
            raise InputError("data.seed", seed, "must not be negative")
        if on_error not in ("raise", "skip"):
            raise InputError("data.on_error", on_error, "must be raise or skip")
        if padding_side not in ("auto", "left", "right"):
            raise InputError("data.padding_side", padding_side, "must be auto, left or right")
        if max_pixels is not None and max_pixels < 1:
            raise InputError("data.max_pixels", max_pixels, "must be at least 1")
        counts = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed, "max_pixels": max_pixels}
        for name, value in counts.items():
            refuse_huge(f"data.{name}", value)
        self.source = own_instance(source)
        self.num_samples = num_samples
        self.seed = seed
        self.batch_size = batch_size
        self.on_error = on_error
        self.padding_side, self.max_pixels = padding_side, max_pixels
        self.skipped: list[tuple[str, str]] = []
        """Name of each sample that this process left out, and why, the last time that it went through them."""
        self._warned: set[tuple[str, str]] = set()
        self._kind = "calibration"  # what its samples are called
        self._selection: list[int] | None = None
        self._enough: int | None = None  # samples that can be read, after which no more are taken; None: all are

    def setup(self, stage: str | None = None) -> None:
        """Open the source, choose the samples and check them, all without the model.

        Raises:
            InputError: The source cannot be read, holds fewer samples than asked for, or (`on_error: raise`) one of
                the chosen ones is visibly wrong.
        """
        selection = self.select()
        if self.on_error != "raise":
            return
        try:
            with mounted(data=self):
                self.source.verify(selection)
        except InputError as error:
            raise InputError(error.option, error.value, f"{error.problem}; {_WAY_OUT}") from None

    def select(self) -> list[int]:
        """Numbers of the chosen samples in the source, in the order of the set. See the source's `choose`."""
        if self._selection is None:
            with mounted(data=self):
                self._selection = self._choose()
        return self._selection

    def held_back(self, count: int) -> tuple[CalibrationDataModule, bool]:
        """A set of other samples of the same source, for measuring; one that cannot be read is replaced.

        Args:
            count: How many, at most.

        Returns:
            The set, and whether its samples are others than those that calibrate: where the source has no others, they
            are some of these, from all over the set.
        """
        chosen = self.select()
        found = self._beside(chosen, count)
        if not found:
            every = max(len(chosen) // count, 1)
            return self.of(chosen[::every][:count]), False
        first = found[:count]
        spare = self._beside([*chosen, *first], _SPARE * count)
        return self.of([*first, *spare], count), True

    def _beside(self, numbers: Sequence[int], count: int) -> list[int]:
        """Up to about `count` samples of the source that are none of these, the same ones each time."""
        try:
            wanted = min(len(numbers) + count, self.source.available)
            return sorted(set(self.source.choose(wanted, self.seed)) - set(numbers))
        except ValueError:  # of a source that cannot give as many
            return []

    def of(self, numbers: Sequence[int], enough: int | None = None) -> CalibrationDataModule:
        """A set of these samples of the source, for one process; those that cannot be read are left out.

        Args:
            numbers: Their numbers in the source.
            enough: How many of them to take, the first ones that can be read. Default: all.
        """
        other = copy.copy(self)
        other.on_error, other.skipped, other._kind = "skip", [], "held-back"
        other._selection, other._enough = list(numbers), enough
        return other

    def _choose(self) -> list[int]:
        self.source.setup()
        total = len(self.source)
        if total == 0:
            raise InputError("data.source", type(self.source).__name__, "holds no samples")
        if self.num_samples is not None and self.num_samples > total:
            problem = f"the source holds only {total} sample{'' if total == 1 else 's'}"
            raise InputError("data.num_samples", self.num_samples, problem)
        default = self.source.default_num_samples
        count = self.num_samples or min(default or total, self.source.available)
        return self.source.choose(count, self.seed)

    def sample_weights(self, numbers: Sequence[int]) -> list[float]:
        """How much each sample counts in calibration statistics; their mean is 1.

        Args:
            numbers: Numbers in the selection, 0 ... `num_samples` - 1, of the samples that all processes read.
        """
        selection = self.select()
        return self.source.sample_weights([selection[number] for number in numbers])

    def calibration_batches(
        self,
        processor: Any = None,
        rank: int = 0,
        world_size: int = 1,
        with_labels: bool = False,
        batch_size: int | None = None,
        limits: ModelLimits = NO_LIMITS,
    ) -> Iterator[CalibrationBatch]:
        """This process' share of the calibration set.

        The selection is cut into runs of `batch_size` samples, which are dealt out in turn: every sample comes exactly
        once, and shares may differ by a run. A run becomes one batch, or several if its samples cannot be stacked
        without padding anything but tokens (see `batch_key`). A run whose samples are all skipped becomes none, so a
        share can be empty.

        Padding never counts in a statistic, on whichever side it is.

        Args:
            processor: From `load_processor`; not needed for sources of ready-made inputs.
            rank: Number of this process.
            world_size: Number of processes.
            with_labels: Hand on the entry `labels` of ready-made inputs, if there is one.
            batch_size: Samples per batch. Default: `data.batch_size`.
            limits: What the model takes; a sample beyond them counts as one that cannot be read.

        Raises:
            RunError: A sample cannot be read (`on_error: raise`), or every one was skipped on a single process.
        """
        if processor is None and self.source.needs_processor:
            raise ValueError(f"{type(self.source).__name__} needs the model's processor")
        pad_token_id = limits.padding(pad_token_of(processor)) if processor is not None else 0
        side = padding_side_of(processor) if self.padding_side == "auto" else self.padding_side
        selection = self.select()
        self.skipped = []
        batch_size = batch_size or self.batch_size
        starts = range(0, len(selection), batch_size)
        for start in islice(starts, rank, None, world_size):
            if self._enough is not None and start - len(self.skipped) >= self._enough:
                return
            groups: dict[tuple, list[tuple[int, Inputs]]] = {}
            for index in range(start, min(start + batch_size, len(selection))):
                inputs = self._read(selection[index], processor, limits)
                if inputs is not None:
                    if not with_labels:
                        inputs.pop("labels", None)
                    groups.setdefault(batch_key(inputs), []).append((index, inputs))
            for group in groups.values():
                yield CalibrationBatch(
                    inputs=collate([inputs for _, inputs in group], pad_token_id, side),
                    indices=[index for index, _ in group],
                    digests=[digest(inputs) for _, inputs in group],
                )
        if world_size == 1 and len(self.skipped) == len(selection):
            name, reason = self.skipped[0]
            raise RunError(f"no {self._kind} sample could be read; the first one, {name}: {reason}")

    def _read(self, index: int, processor: Any, limits: ModelLimits) -> Inputs | None:
        """Model inputs of sample `index` of the source; None if it is left out."""
        name = f"sample {index}"
        try:
            sample = sample_of(self.source, index)
            name = getattr(sample, "id", "") or name
            limits.refuse_media(processor, sample)
            inputs = self._encode(sample, processor)
            limits.refuse(inputs)
            return inputs
        except RunError as error:
            self._leave_out(getattr(error, "id", "") or name, str(error))
            return None

    def leave_out(self, number: int, reason: str) -> None:
        """Leave out a sample that was read, because something else cannot do with it.

        Args:
            number: Its number in the selection.
            reason: What is wrong with it.

        Raises:
            RunError: A bad sample is an error (`on_error: raise`).
        """
        index = self.select()[number]
        self._leave_out(getattr(self.source[index], "id", "") or f"sample {index}", reason)

    def _leave_out(self, name: str, reason: str) -> None:
        if self.on_error == "raise":
            raise RunError(f"{self._kind} {name}: {reason} ({_WAY_OUT})") from None
        if (name, reason) not in self._warned:
            self._warned.add((name, reason))
            if len(self._warned) <= _NAMED:
                log.warning("left out %s %s: %s", self._kind, one_line(name), one_line(reason))
            elif len(self._warned) == _NAMED + 1:
                named = "; the others are named in the record" if self._kind == "calibration" else ""
                log.warning("left out more than %d %s samples%s", _NAMED, self._kind, named)
        self.skipped.append((name, reason))

    def one_by_one(self, numbers: Sequence[int], processor: Any, limits: ModelLimits) -> Iterator[CalibrationBatch]:
        """Samples of a batch once more, each in a batch of its own.

        Args:
            numbers: Numbers in the selection.
            processor: From `load_processor`; not needed for sources of ready-made inputs.
            limits: What the model takes.
        """
        for number in numbers:
            inputs = self._read(self.select()[number], processor, limits)
            if inputs is not None:
                inputs.pop("labels", None)
                yield CalibrationBatch(collate([inputs]), [number], [digest(inputs)])

    def _encode(self, sample: Sample, processor: Any) -> Inputs:
        if not isinstance(sample, (Conversation, Document)):
            return dict(sample)
        with refusals(processor):
            return encode(processor, sample, max_pixels=self.max_pixels)
