"""The one loop: calibration samples stream through decoder or vision tower, block by block, and hooks are raised.

    for each block:   load weights ─► forward all samples ─► hooks ─► forward again ─► hooks ─► release weights
                                      gather statistics      prune    propagate       write

    site by site:     load weights ─► forward all samples ─► hooks ─┬─► forward as far as a site ─► hooks ─┬─► ...
                                      choose tokens                 └──◄ gather for it              prune ◄─┘

    in one pass:      load weights ─► forward all samples ─► hooks ─► release weights       (inputs of the dense model)

    survey before:    load weights ─► forward all samples ─► hooks ─► release weights       (dense, nothing changes)

The loop knows nothing about pruning; callbacks do everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.blocks import (
    CaughtBatch,
    Part,
    Placement,
    Weights,
    find_expert_stacks,
    prunable_linears,
)
from lvlm_prune.blocks.remaining import RemainingDecoderBlocks, WaitingSample
from lvlm_prune.checkpoints import give_back_freed
from lvlm_prune.errors import RunError
from lvlm_prune.loop.activations import Activations, SampleRow, fork_rows, recording
from lvlm_prune.loop.block import Block
from lvlm_prune.loop.dense_path import DensePath
from lvlm_prune.memory.measuring import Stopwatch, peak_memory
from lvlm_prune.methods.modality import TEXT
from lvlm_prune.methods.tokens import EXPERTS


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
        follows_dense: Activations are to hold what the dense model feeds the Linears too: copies of the samples go
            through the dense model beside the others.
        by_site: The input sites of a block are gathered for and pruned one after the other.
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
        follows_dense: bool = False,
        by_site: bool = False,
    ) -> None:
        self.device, self.one_pass, self.follows_dense, self.by_site = device, one_pass, follows_dense, by_site
        self._dense: DensePath | None = None
        self.part, self.runner, self.weights = part, part.runner, weights
        self.raise_hook, self.gathers, self.needs, self.agree = raise_hook, gathers, needs, agree
        self.placement = placement or Placement()
        self.rows = rows
        self._calls: dict[int, list[str]] = {}
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
        if self.follows_dense:
            self._dense = DensePath(self.runner, self.batches, self.placement)
        last_open = max((place for place in range(len(self.runner)) if place not in set(done)), default=-1)
        for place in range(last_open + 1):
            if place in done:
                assert load_done is not None
                load_done(place)
                self._together(self._propagate, self._block(place), hooks=False)
                if self._dense is not None:
                    self.weights.load_block(place)
                    self._together(self._dense.advance, place)
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
        block.keeps_dense = self.by_site and self._dense is not None
        seconds["read"] = clock.lap()
        self.raise_hook("on_block_start", block=block)
        gathers = self.gathers()
        self._calls.clear()
        if gathers:
            self._together(self._gather, block, moves_on=self.one_pass)
        give_back_freed()
        seconds["gather"] = clock.lap()
        self.raise_hook("on_block_calibrated", block=block)
        give_back_freed()
        seconds["score"] = clock.lap()
        while block.open_sites:
            names = block.open_sites.pop(0)
            self._together(self._gather_site, block, names)
            give_back_freed()
            seconds["gather"] += clock.lap()
            self.raise_hook("on_site_calibrated", block=block, names=names)
            give_back_freed()
            seconds["score"] += clock.lap()
        if self._dense is not None and self.by_site and not is_last:
            with block.dense_weights():
                self._together(self._dense.advance, place)
            block.dense.clear()
            seconds["gather"] += clock.lap()
        seconds["score"], seconds["solve"] = seconds["score"] - block.solve_seconds, block.solve_seconds
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
        # Site by site, what the dense model feeds a site is looked at when it is the site's turn.
        follows = self._dense is not None and not self.by_site and hook == "on_calibration_batch_end"
        for batch, here, copy in self._beside(called, block.place, follows):
            hidden_out = self._observe(block, batch, here, copy, forward, hook)
            totals.append((batch, hidden_out.float().sum()))

        def origin(batch: CaughtBatch) -> str:
            return _broken_weight(block) if moves_on else self._origin(block, batch)

        self._refuse_faults(totals, f"in the output of block {block.name}", origin)

    def _beside(
        self, batches: Sequence[CaughtBatch], place: int, follows_dense: bool
    ) -> Iterator[tuple[CaughtBatch, CaughtBatch, CaughtBatch | None]]:
        """Each batch in turn: (as it waits, on the device, and the dense model's on the device if that is wanted)."""
        if follows_dense and self._dense is not None:
            yield from self._dense.beside(batches, place)
            return
        for batch, here in self.placement.stream(batches, place):
            yield batch, here, None

    def _observe(
        self,
        block: Block,
        batch: CaughtBatch,
        here: CaughtBatch,
        copy: CaughtBatch | None,
        forward: Callable[[int, CaughtBatch], Tensor],
        hook: str,
    ) -> Tensor:
        """One forward of one batch, `here` on the device; raises `hook` for each sample with what was computed.

        `copy` is the same batch on its way through the dense model; it moves on.
        """
        hidden_in, of_dense = here.hidden, None
        if copy is not None:
            with recording(block.linears) as of_dense:
                self.runner.advance(block.place, copy)
        with recording(block.linears, self.needs(), block.stacks) as record:
            hidden_out = forward(block.place, here)
        sites = record.sites()
        rows = self.rows_of_batch[id(batch)]
        if self.by_site:
            self._calls[id(batch)] = record.calls
            order = tuple(map(tuple, sites.values()))
            if order not in block.sites.values():
                block.sites[rows[0].sample] = order
        for row in rows:
            sample = Activations(row, record, sites, hidden_in, hidden_out, block.place, of_dense)
            self.raise_hook(hook, block=block, sample=sample)
        return hidden_out

    def _gather_site(self, block: Block, names: Sequence[str]) -> None:
        """Run all batches through the block as far as some of its Linears, as it is by now."""
        linears = {name: block.linears[name] for name in names if name in block.linears}
        routed = len(linears) < len(names)
        needs, stacks = (frozenset({EXPERTS}), block.stacks) if routed else (frozenset(), [])
        # A batch that calls none of them has nothing to add.
        calls = {id(batch): sum(name in linears for name in self._calls.get(id(batch), ())) for batch in self.batches}
        called = [batch for batch in self.batches if calls[id(batch)] or (routed and id(batch) in self._calls)]
        for batch, here, copy in self._beside(called, block.place, not routed):
            stop_after, of_dense = None if routed else calls[id(batch)], None
            if copy is not None:
                with block.dense_weights(), recording(linears, stop_after=stop_after) as of_dense:
                    self.runner.run(block.place, copy)
            with recording(linears, needs, stacks, stop_after) as record:
                self.runner.run(block.place, here)
            sites = record.sites()
            for row in self.rows_of_batch[id(batch)]:
                sample = Activations(row, record, sites, here.hidden, here.hidden, block.place, of_dense)
                self.raise_hook("on_site_calibration_batch_end", block=block, sample=sample)

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
