"""The one loop: calibration samples stream through decoder or vision tower, block by block, and hooks are raised.

    for each block:   load weights ─► forward all samples ─► hooks ─► forward again ─► hooks ─► release weights
                                      gather statistics      prune    propagate       write

    in one pass:      load weights ─► forward all samples ─► hooks ─► release weights       (inputs of the dense model)

    survey before:    load weights ─► forward all samples ─► hooks ─► release weights       (dense, nothing changes)

The loop knows nothing about pruning; callbacks do everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.blocks import (
    CaughtBatch,
    ExpertMatrix,
    ExpertStack,
    Part,
    Placement,
    Target,
    Weights,
    find_expert_stacks,
    prunable_linears,
)
from lvlm_prune.blocks.remaining import RemainingDecoderBlocks, WaitingSample
from lvlm_prune.checkpoints import give_back_freed
from lvlm_prune.errors import RunError
from lvlm_prune.loop.activations import Activations, SampleRow, fork_rows, recording
from lvlm_prune.memory.measuring import Stopwatch, peak_memory
from lvlm_prune.methods.modality import TEXT


@dataclass
class Block:
    """A block while it is being worked on.

    Args:
        index: Its number among all blocks of the run; those of a vision tower come before those of the decoder.
        place: Its number in its own decoder or tower.
        target: `language` or `vision`: what it belongs to.
        name: Its full module path.
        module: The module itself; its weights are loaded.
        linears: Name relative to the block -> every Linear that could be pruned.
        stacks: Stacks of routed experts, whose matrices could be pruned.
        masks: Name relative to the block -> mask of each Linear or expert matrix that was pruned (True where pruned);
            filled by the pruning callback in `on_block_calibrated`.
        updated: Names of pruned Linears whose remaining weights changed too.
        record: Numbers about this block for the manifest, filled by callbacks and by the loop.
        forwards: Forwards of the block on this process, one per calibration batch and pass; known when the block ends.
        solve_seconds: Time in which remaining weights were updated, noted by the pruning callback.
    """

    index: int
    place: int
    target: Target
    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    stacks: list[ExpertStack] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)
    record: dict[str, Any] = field(default_factory=dict)
    forwards: int = 0
    solve_seconds: float = 0.0

    def matrices(self) -> dict[str, nn.Linear | ExpertMatrix]:
        """Name relative to the block -> every Linear and every matrix of a routed expert."""
        return {**self.linears, **{matrix.name: matrix for stack in self.stacks for matrix in stack.matrices()}}


class BlockLoop:
    """Streams calibration batches through a decoder, or a vision tower, and raises hooks at each block.

    Args:
        part: The blocks.
        weights: Brings a block's weights into memory and releases them.
        rows: The calibration samples of this process, in order.
        raise_hook: Called as `raise_hook(name, **arguments)`.
        gathers: Whether anybody wants activations; asked at each block.
        needs: What activations are to hold besides the inputs of the Linears, of `lvlm_prune.methods.tokens.NEEDS`.
        agree: Called after each pass with the exception that it raised, or None; fails on every process if one did.
        placement: Where the samples wait for their turn.
        device: Where the blocks run.
        one_pass: Samples go on with what they were gathered from: each block sees the dense model's inputs, and runs
            once for each batch instead of twice.
    """

    def __init__(
        self,
        part: Part,
        weights: Weights,
        rows: Sequence[SampleRow],
        raise_hook: Callable[..., None],
        gathers: Callable[[], bool],
        needs: Callable[[], frozenset[str]],
        agree: Callable[[BaseException | None], None],
        placement: Placement | None = None,
        device: torch.device | str = "cpu",
        one_pass: bool = False,
    ) -> None:
        self.device, self.one_pass = device, one_pass
        self.part, self.runner, self.weights = part, part.runner, weights
        self.raise_hook, self.gathers, self.needs, self.agree = raise_hook, gathers, needs, agree
        self.placement = placement or Placement()
        self.rows = rows
        self.rows_of_batch: dict[int, list[SampleRow]] = {}
        self.batches: list[CaughtBatch] = []
        for row in rows:
            if id(row.batch) not in self.rows_of_batch:
                self.batches.append(row.batch)
            self.rows_of_batch.setdefault(id(row.batch), []).append(row)

    def fork(self) -> BlockLoop:
        """A loop over copies of the samples, which leaves those of this loop where they are."""
        shared = self.raise_hook, self.gathers, self.needs, self.agree, self.placement, self.device
        return BlockLoop(self.part, self.weights, fork_rows(self.rows), *shared)

    @torch.no_grad()
    def run(self, done: Sequence[int] = (), load_done: Callable[[int], None] | None = None) -> None:
        """Go through all blocks.

        Args:
            done: Places of blocks that an earlier run finished; samples only pass through them, and no hook is raised.
            load_done: Loads the weights of the block in such a place: the finished ones, or in one pass the dense ones.
        """
        last_open = max((place for place in range(len(self.runner)) if place not in set(done)), default=-1)
        for place in range(last_open + 1):
            if place in done:
                assert load_done is not None
                load_done(place)
                self._together(self._propagate, self._block(place), hooks=False)
            else:
                following = place + 1 if place < last_open and place + 1 not in done else None
                self._work(place, is_last=place == last_open, following=following)
            self.weights.release_block(place)

    @torch.no_grad()
    def survey(self, done: int = 0) -> int:
        """Go through all blocks of the dense model: each sample runs once through each block, and nothing changes.

        Args:
            done: Blocks that an interrupted run surveyed; samples only pass through them, and no hook is raised.

        Returns:
            Forwards of the other blocks: one per calibration batch and block, and those that plugins ask for.
        """
        for place in range(done):
            self.weights.load_block(place)
            self._together(self._propagate, self._block(place), hooks=False)
            self.weights.release_block(place)
        before = self.runner.forwards
        for place in range(done, len(self.runner)):
            forwards = self.runner.forwards
            self.weights.load_block(place)
            block = self._block(place)
            start = {"block": block, "tail": self.tail(place)}
            self._together(self.raise_hook, "on_survey_block_start", **start)
            if self.gathers():
                self._together(self._gather, block, "on_survey_calibration_batch_end")
                self.raise_hook("on_survey_block_calibrated", block=block)
            self._together(self.raise_hook, "on_survey_block_changes", **start)
            if place + 1 < len(self.runner):
                self.weights.prefetch_block(place + 1)
            self._together(self._gather, block, "on_survey_batch_end", moves_on=True)
            block.forwards = self.runner.forwards - forwards
            self.raise_hook("on_survey_block_end", block=block)
            self.weights.release_block(place)
        return self.runner.forwards - before

    def tail(self, first: int) -> RemainingDecoderBlocks:
        """Block `first`, at whose input the samples are, and all blocks after it."""
        samples = [waiting_sample(row) for row in self.rows]
        return RemainingDecoderBlocks(self.runner, self.weights, samples, first, self.placement)

    def _block(self, place: int) -> Block:
        module, name = self.runner.block(place), self.runner.name(place)
        linears, stacks = prunable_linears(module), find_expert_stacks(module)
        return Block(self.part.first + place, place, self.part.target, name, module, linears, stacks)

    def _work(self, place: int, is_last: bool, following: int | None) -> None:
        seconds, forwards = {}, self.runner.forwards
        clock = Stopwatch(self.device)
        self.weights.load_block(place)
        block = self._block(place)
        seconds["read"] = clock.lap()
        self.raise_hook("on_block_start", block=block)
        gathers = self.gathers()
        if gathers:
            self._together(self._gather, block, moves_on=self.one_pass)
        give_back_freed()
        seconds["gather"] = clock.lap()
        self.raise_hook("on_block_calibrated", block=block)
        give_back_freed()
        seconds["score"], seconds["solve"] = clock.lap() - block.solve_seconds, block.solve_seconds
        # Not earlier: what scoring takes beside the block is gone by now.
        if following is not None:
            self.weights.prefetch_block(following)
        if not is_last and not (gathers and self.one_pass):
            self._together(self._propagate, block)
        seconds["propagate"] = clock.lap()
        block.forwards = self.runner.forwards - forwards
        block.record["seconds"] = seconds
        block.record["peak_memory_bytes"] = peak_memory(self.device)
        self.raise_hook("on_block_end", block=block)

    def _together(self, work: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """One pass on this process' samples; ends on all processes alike."""
        error: Exception | None = None
        try:
            work(*arguments, **options)
        except Exception as problem:
            error = problem
        self.agree(error)

    def _gather(self, block: Block, hook: str = "on_calibration_batch_end", moves_on: bool = False) -> None:
        """Run all batches through the block; with `moves_on` they are at the next one afterwards."""
        totals = []
        called = [batch for batch in self.batches if self.runner.calls(block.place, batch)]
        forward = self.runner.advance if moves_on else self.runner.run
        for batch, here in self.placement.stream(called, block.place):
            hidden_out = self._observe(block, batch, here, forward, hook)
            totals.append((batch, hidden_out.float().sum()))

        def origin(batch: CaughtBatch) -> str:
            return _broken_weight(block) if moves_on else self._origin(block, batch)

        self._refuse_faults(totals, f"in the output of block {block.name}", origin)

    def _observe(
        self,
        block: Block,
        batch: CaughtBatch,
        here: CaughtBatch,
        forward: Callable[[int, CaughtBatch], Tensor],
        hook: str,
    ) -> Tensor:
        """One forward of one batch, `here` on the device; raises `hook` for each sample with what was computed."""
        hidden_in = here.hidden
        with recording(block.linears, self.needs(), block.stacks) as record:
            hidden_out = forward(block.place, here)
        sites = record.sites()
        for row in self.rows_of_batch[id(batch)]:
            sample = Activations(row, record, sites, hidden_in, hidden_out, block.place)
            self.raise_hook(hook, block=block, sample=sample)
        return hidden_out

    def _propagate(self, block: Block, hooks: bool = True) -> None:
        totals = []
        for batch, here in self.placement.stream(self.batches, block.place):
            self.runner.advance(block.place, here)
            totals.append((batch, here.hidden.float().sum()))
            if hooks:
                self.raise_hook("on_propagation_batch_end", block=block)
        self._refuse_faults(totals, f"in the output of pruned block {block.name}")

    def _refuse_faults(
        self, totals: list[tuple[CaughtBatch, Tensor]], where: str, origin: Callable[[CaughtBatch], str] | None = None
    ) -> None:
        """Stop at NaN or infinity, with one look at the sums of all batches: a look at each would make a GPU wait."""
        if not totals or torch.isfinite(torch.stack([total for _, total in totals])).all():
            return
        batch = next(batch for batch, total in totals if not torch.isfinite(total))
        samples = ", ".join(str(row.sample) for row in self.rows_of_batch[id(batch)])
        first = origin(batch) if origin is not None else ""
        raise RunError(f"NaN or infinity {where}{first} for calibration sample {samples}")

    def _origin(self, block: Block, batch: CaughtBatch) -> str:
        """The first Linear of the block at which NaN or infinity shows up, found by running the batch once more."""
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                for what, value in (("input", arguments[0]), ("output", output)):
                    if not found and not torch.isfinite(value).all():
                        found.append(f", first in the {what} of {name},")

            return hook

        handles = [linear.register_forward_hook(look(name)) for name, linear in block.linears.items()]
        try:
            self.runner.run(block.place, self.placement.fetched(batch))
        finally:
            for handle in handles:
                handle.remove()
        return "".join(found)


def _broken_weight(block: Block) -> str:
    """The first weight or bias of the block with NaN or infinity in it; nothing where there is none."""
    broken = (name for name, value in block.module.named_parameters() if not torch.isfinite(value).all())
    return next((f", first in {name}," for name in broken), "")


def waiting_sample(row: SampleRow) -> WaitingSample:
    """A sample that waits for what comes after a block; every text token is to be predicted."""
    assert row.batch.input_ids is not None
    predicted = torch.zeros_like(row.batch.input_ids[row.row], dtype=torch.bool)
    is_text = row.modality == TEXT
    if row.real is None:
        predicted[:] = is_text
    else:
        predicted[row.real] = is_text
    return WaitingSample(row.sample, row.batch, row.row, predicted)
