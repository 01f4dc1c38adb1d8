"""Losses of the dense model when the weights of one block change: only that block and those after it run again.

cached input of block b ─► block b (changed) ─► b + 1 ─► ... ─► last ─► norm ─► lm_head ─► next-token loss
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from lvlm_prune.blocks.capture import CaughtBatch
from lvlm_prune.blocks.execution import BlockRunner
from lvlm_prune.blocks.placement import Placement
from lvlm_prune.blocks.weights import ResidentWeights, Weights
from lvlm_prune.errors import InputError
from lvlm_prune.methods.survey import Change

# Hidden states that are held at once while streamed blocks pass by. More samples together read the blocks less often.
HELD_BYTES = 2**32

# Logits of so many positions are held at once: a vocabulary is fifty times as wide as a model.
_POSITIONS = 512

# Positions of a sample at which the answers are compared.
ANSWERS = 256


@dataclass(frozen=True)
class WaitingSample:
    """One sample at the input of the block where they wait.

    Args:
        sample: Its number in the whole calibration set.
        batch: The batch that holds it.
        row: Its row there.
        predicted: Which positions are tokens to be predicted from what is before them, bool of shape (S,).
    """

    sample: int
    batch: CaughtBatch
    row: int
    predicted: Tensor


class RemainingDecoderBlocks:
    """Blocks from `first` to the last, and what comes after them, for samples at the input of block `first`.

    Args:
        runner: Runs the decoder's blocks.
        weights: Brings later blocks into memory and releases them.
        samples: Samples of this process.
        first: Index of the first block; it is in memory, and stays there.
        placement: Where the samples wait.
    """

    def __init__(
        self,
        runner: BlockRunner,
        weights: Weights,
        samples: Sequence[WaitingSample],
        first: int,
        placement: Placement | None = None,
    ) -> None:
        self._runner, self._weights, self._samples, self._first = runner, weights, samples, first
        self._placement = placement or Placement()

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._runner) - self._first

    @property
    def block(self) -> nn.Module:
        """The module of the first block that is left to run; its weights are in memory."""
        return self._runner.block(self._first)

    @property
    def num_samples(self) -> int:
        """Number of samples of this process."""
        return len(self._samples)

    def of_samples(self, numbers: Container[int]) -> RemainingDecoderBlocks:
        """The same blocks for those samples of this process that have one of these numbers."""
        chosen = [sample for sample in self._samples if sample.sample in numbers]
        return RemainingDecoderBlocks(self._runner, self._weights, chosen, self._first, self._placement)

    @torch.no_grad()
    def losses(self, changes: Sequence[Change]) -> dict[int, list[float]]:
        r"""Next-token loss of each sample under each change of the first block's weights.

        .. math:: L = -\frac{1}{n} \sum_{t \,\text{text}} \log p(x_t \mid x_{<t})

        Args:
            changes: How the weights change.

        Returns:
            Number of each sample of this process -> its loss in nats under each change.

        Raises:
            InputError: The model has no output embedding.
        """
        found: dict[int, list[float]] = {}
        for sample, batch in self._behind_the_last(changes, with_head=True):
            found.setdefault(sample.sample, []).append(self._loss(sample, batch))
        return found

    @torch.no_grad()
    def answers(self) -> dict[int, Tensor]:
        """What the unchanged model answers at text positions: number of each sample of this process -> hidden states.

        Of shape (n, D), behind the last norm, at no more than 256 positions that a text token follows, evenly spaced.
        """
        return {sample.sample: self._answers(sample, batch) for sample, batch in self._behind_the_last([_unchanged])}

    def targets(self) -> dict[int, Tensor]:
        """Number of each sample of this process -> tokens (n,) that follow the positions of `answers`, int64."""
        found = {}
        for sample in self._samples:
            assert sample.batch.input_ids is not None
            found[sample.sample] = sample.batch.input_ids[sample.row, self._positions(sample) + 1]
        return found

    @torch.no_grad()
    def divergences(self, changes: Sequence[Change], dense: Mapping[int, Tensor]) -> dict[int, list[float]]:
        r"""How far each change of the first block's weights moves the answers of each sample.

        .. math:: \mathrm{KL} = \frac{1}{n} \sum_t \sum_v p_t(v) \log \frac{p_t(v)}{q_t(v)}

        with p the dense model's distribution over the next token, and q the changed one's.

        Args:
            changes: How the weights change.
            dense: What `answers` returned for the same samples.

        Returns:
            Number of each sample of this process -> its divergence in nats under each change.

        Raises:
            InputError: The model has no output embedding.
        """
        moved: dict[int, list[Tensor]] = {}
        for sample, batch in self._behind_the_last(changes):
            moved.setdefault(sample.sample, []).append(self._answers(sample, batch))
        with self._weights.output_embedding():
            return {sample: self._divergences(dense[sample], answers) for sample, answers in moved.items()}

    def _behind_the_last(
        self, changes: Sequence[Change], with_head: bool = False
    ) -> Iterator[tuple[WaitingSample, CaughtBatch]]:
        """Each sample behind the last block under each change; under one change after the other, as far as they fit.

        With the output embedding in memory as they come, if that is wanted.
        """
        largest = max((sample.batch.hidden.nbytes for sample in self._samples), default=1)
        together = max(HELD_BYTES // max(largest * len(changes), 1), 1)
        for start in range(0, len(self._samples), together):
            if isinstance(self._weights, ResidentWeights):  # nothing is read, so nothing is gained from holding more
                for sample, batch in self._behind_the_first(self._samples[start : start + together], changes):
                    for index in range(self._first + 1, len(self._runner)):
                        self._runner.advance(index, batch)
                    yield sample, batch
                continue
            held = list(self._behind_the_first(self._samples[start : start + together], changes))
            for index in range(self._first + 1, len(self._runner)):
                self._weights.load_block(index)
                if index + 1 < len(self._runner):
                    self._weights.prefetch_block(index + 1)
                for _, batch in held:
                    self._runner.advance(index, batch)
                self._weights.release_block(index)
            with self._weights.output_embedding() if with_head else nullcontext():
                yield from held

    def _behind_the_first(
        self, chosen: Sequence[WaitingSample], changes: Sequence[Change]
    ) -> Iterator[tuple[WaitingSample, CaughtBatch]]:
        here = [self._placement.fetched(sample.batch) for sample in chosen]
        for change in changes:
            for sample, fetched in zip(chosen, here):
                batch = fetched.fork()
                with change(sample.sample):
                    self._runner.advance(self._first, batch)
                yield sample, batch

    def _loss(self, sample: WaitingSample, batch: CaughtBatch) -> float:
        hidden = self._runner.finish(batch)[sample.row]
        positions = sample.predicted[1:].nonzero().flatten()
        total = hidden.new_zeros((), dtype=torch.float64)
        for part in positions.split(_POSITIONS):
            assert batch.input_ids is not None
            targets = batch.input_ids[sample.row, part + 1]
            total += cross_entropy(self._logits(hidden[part]), targets, reduction="sum").double()
        return total.item() / max(len(positions), 1)

    def _answers(self, sample: WaitingSample, batch: CaughtBatch) -> Tensor:
        return self._runner.finish(batch)[sample.row][self._positions(sample)]

    @staticmethod
    def _positions(sample: WaitingSample) -> Tensor:
        positions = sample.predicted[1:].nonzero().flatten()
        every = -(-len(positions) // ANSWERS)
        return positions[:: max(every, 1)]

    def _divergences(self, dense: Tensor, changed: Sequence[Tensor]) -> list[float]:
        """Of one sample under each change; the dense model's logits, as dear as a change's, are made once for all."""
        totals = [dense.new_zeros((), dtype=torch.float64) for _ in changed]
        for part in range(0, len(dense), _POSITIONS):
            rows = slice(part, part + _POSITIONS)
            expected = self._logits(dense[rows]).log_softmax(dim=-1)
            for total, answers in zip(totals, changed):
                found = self._logits(answers[rows]).log_softmax(dim=-1)
                total += kl_div(found, expected, reduction="sum", log_target=True).double()
        return [total.item() / max(len(dense), 1) for total in totals]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._runner.model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            problem = "has no output embedding, so it has no next-token loss"
            raise InputError("model.path", type(self._runner.model).__name__, problem)
        return head(hidden).float()

    def seconds(self) -> tuple[float, float]:
        """Seconds of one forward of the first block and of one loss, measured on the first sample; 0.0 without any.

        These forwards, which each process makes for itself, are not counted.
        """
        if not self._samples:
            return 0.0, 0.0
        sample = self._samples[0]
        batch, counted = self._placement.fetched(sample.batch), self._runner.forwards
        block = _seconds(lambda: self._runner.run(self._first, batch), batch.hidden.device)
        with self._weights.output_embedding():
            loss = _seconds(lambda: self._loss(sample, batch), batch.hidden.device)
        self._runner.forwards = counted
        return block, loss


def _unchanged(sample: int) -> AbstractContextManager[None]:
    return nullcontext()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second of two calls: the first one warms up."""
    with torch.no_grad():
        work()
        _wait_for(device)
        started = time.perf_counter()
        work()
        _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
