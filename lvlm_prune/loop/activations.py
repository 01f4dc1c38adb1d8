"""What a block computes on one calibration batch: inputs of its Linears, grouped by input site, cut into samples.

q_proj k_proj v_proj ─┐ one tensor feeds them: one site        batch row ─► Activations of one sample
gate_proj up_proj ────┘ (found by tensor identity)             padding removed, tokens flattened to (T, C)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.blocks import CaughtBatch, ExpertStack, attended, modality_of_tokens
from lvlm_prune.blocks.attention import AttentionCall, recorded_attention, self_attention
from lvlm_prune.blocks.capture import StopForward
from lvlm_prune.blocks.experts import RoutedCall, RoutedInput, rows_in_call
from lvlm_prune.errors import RunError
from lvlm_prune.methods.modality import MODALITIES, PADDING
from lvlm_prune.methods.tokens import ATTENTION_NEEDS, EXPERTS, NEEDS, Tokens


@dataclass(frozen=True)
class SampleRow:
    """One calibration sample: a row of a caught batch.

    Args:
        sample: Number of the sample in the whole calibration set.
        batch: The batch that holds it.
        row: Its row there.
        real: Indices of the real (not padded) positions, int64 of shape (T,); None where all are.
        modality: Modality code of each real token, int8 of shape (T,).
        weight: How much the sample counts in calibration statistics; the mean over all samples is 1.
        places: Names of modalities -> where their tokens are, as `indices` found it.
    """

    sample: int
    batch: CaughtBatch
    row: int
    real: Tensor | None
    modality: Tensor
    weight: float = 1.0
    places: dict[tuple[str, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def indices(self, *modalities: str) -> Tensor:
        """Indices of the real tokens of these modalities, int64; looked for once, since a GPU has to be waited for."""
        if modalities not in self.places:
            self.places[modalities] = self.of(*modalities).nonzero().flatten()
        return self.places[modalities]

    def of(self, *modalities: str) -> Tensor:
        """Which of the real tokens are of these modalities, bool of shape (T,)."""
        members = torch.zeros_like(self.modality, dtype=torch.bool)
        for name in modalities:
            members |= self.modality == MODALITIES[name]
        return members

    def modality_counts(self) -> tuple[int, int, int]:
        """Numbers of text, visual (image and video) and audio tokens."""
        text, visual, audio = self.indices("text"), self.indices("image", "video"), self.indices("audio")
        return len(text), len(visual), len(audio)

    def cut(self, values: Tensor) -> Tensor:
        """Real positions of (S, ...) values, shape (T, ...)."""
        return values if self.real is None else values[self.real]


def rows_of(batch: CaughtBatch, config: object, samples: Iterable[int]) -> list[SampleRow]:
    """The samples of a caught batch, one per row; `samples` are their numbers in the whole calibration set."""
    if batch.input_ids is None:
        raise ValueError("calibration inputs need `input_ids`: they say which tokens are visual")
    modality = modality_of_tokens(config, batch.input_ids, batch.attention_mask)
    rows = []
    for row, sample in enumerate(samples):
        real = (modality[row] != PADDING).nonzero().flatten()
        padded = len(real) < modality.shape[1]
        rows.append(SampleRow(sample, batch, row, real if padded else None, modality[row][real]))
    return rows


def row_of_tower(batch: CaughtBatch, sample: int, modality: str) -> SampleRow:
    """One call of a vision tower, all images of which belong to calibration sample `sample`.

    A patch that no other may attend to is padding.
    """
    count = batch.token_shape[1]
    mask = batch.arguments[min(batch.arguments)].get("attention_mask")
    real: Tensor | None = None
    if isinstance(mask, Tensor) and mask.ndim == 4 and batch.hidden.ndim == 3:
        seen = attended(mask, batch.hidden[..., 0]).flatten()
        real = None if seen.all() else seen.nonzero().flatten()
    kept = count if real is None else len(real)
    codes = torch.full((kept,), MODALITIES[modality], dtype=torch.int8, device=batch.hidden.device)
    return SampleRow(sample, batch, 0, real, codes)


def batches_of(rows: Iterable[SampleRow]) -> list[CaughtBatch]:
    """The batches that hold the samples, each once, in order."""
    return list({id(row.batch): row.batch for row in rows}.values())


def fork_rows(rows: Iterable[SampleRow]) -> list[SampleRow]:
    """Copies of the samples that go their own way through the decoder; the given ones stay where they are."""
    copies: dict[int, CaughtBatch] = {}
    forked = []
    for row in rows:
        if id(row.batch) not in copies:
            copies[id(row.batch)] = row.batch.fork()
        forked.append(replace(row, batch=copies[id(row.batch)]))
    return forked


@dataclass(frozen=True)
class SiteInput:
    """What one input site was fed of one sample.

    Args:
        name: Name of the site: its first Linear.
        inputs: The tokens, shape (n, C_in).
        repeats: How often each decoder token occurs in them: 1 for ordinary sites (n = T), k where k streams run side
            by side (n = k T, stream by stream), and 0 where the tokens are not the decoder's own, as in the keys and
            values of cross-attention.
        dense: What the dense model feeds the site, of the same shape; None where nobody asked, and for tokens that are
            not the decoder's own.
    """

    name: str
    inputs: Tensor
    repeats: int
    dense: Tensor | None = None


@dataclass
class ForwardRecord:
    """What a block computed in one forward of one batch: inputs of its Linears, and what else was asked for."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    later_inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    routed: list[tuple[ExpertStack, RoutedCall]] = field(default_factory=list)

    def calls_of(self, site: str) -> list[Tensor]:
        """The input of a site in each call of its first Linear."""
        return [self.inputs[site], *self.later_inputs.get(site, ())] if site in self.inputs else []

    def sites(self) -> dict[str, list[str]]:
        """Name of a site (its first Linear) -> the Linears that it feeds.

        Raises:
            RuntimeError: The block changed the input of a Linear in place afterwards.
            RunError: The block calls a Linear several times that shares its first input with others.
        """
        leaders: dict[tuple, str] = {}
        sites: dict[str, list[str]] = {}
        for name, value in self.inputs.items():
            if value._version != self.versions[name]:
                raise RuntimeError(f"the block changes the input of `{name}` in place")
            # All recorded inputs are alive, so equal storage means the same tensor, be it through another view object.
            leader = leaders.setdefault((value.data_ptr(), value.shape, value.stride()), name)
            sites.setdefault(leader, []).append(name)
        for linears in sites.values():
            called_again = next((name for name in linears if name in self.later_inputs), None)
            if called_again is not None and len(linears) > 1:
                raise RunError(f"{called_again} is called more than once in one forward and shares its first input")
        return sites


@contextmanager
def recording(
    linears: Mapping[str, nn.Module],
    needs: frozenset[str] = frozenset(),
    stacks: Iterable[ExpertStack] = (),
    stop_after: int | None = None,
) -> Iterator[ForwardRecord]:
    """Record what feeds the Linears while the context is open.

    Args:
        linears: Name relative to the block -> Linear.
        needs: What else is to be recorded: outputs of the Linears, queries and keys of the attention (`tokens.NEEDS`),
            what is routed to experts (`tokens.EXPERTS`).
        stacks: Stacks of routed experts.
        stop_after: Leave the forward, and the context with it, at the last of so many calls of the Linears; None: it
            runs to its end.
    """
    record = ForwardRecord()

    def hook(name: str):
        def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            record.calls.append(name)
            if name not in record.inputs:
                record.inputs[name], record.versions[name] = args[0], args[0]._version
            elif "outputs" in needs:
                raise RunError(f"{name} is called more than once in one forward of its block: its output is not one")
            else:
                record.later_inputs.setdefault(name, []).append(args[0])
            if len(record.calls) == stop_after:
                raise StopForward

        return keep_input

    def output_hook(name: str):
        def keep_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            record.outputs[name] = output

        return keep_output

    def stack_hook(stack: ExpertStack):
        def keep_call(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if any(stack is other for other, _ in record.routed):
                raise RunError(f"{stack.path} is called more than once in one forward of its block, not supported")
            record.routed.append((stack, stack.call(args, keywords)))

        return keep_call

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    if EXPERTS in needs:
        handles += [stack.module.register_forward_pre_hook(stack_hook(stack), with_kwargs=True) for stack in stacks]
    if "outputs" in needs:
        handles += [module.register_forward_hook(output_hook(name)) for name, module in linears.items()]
    with suppress(StopForward), ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if needs & ATTENTION_NEEDS:
            stack.enter_context(recorded_attention(record.attention))
        yield record


class Activations:
    """Activations of one sample at one block; valid only while the hook that hands them over runs.

    Args:
        row: The sample.
        record: What was recorded in the forward of its batch.
        sites: Name of a site -> the Linears that it feeds.
        hidden_in: Block input of the whole batch, shape (B, S, D).
        hidden_out: Block output of the whole batch, shape (B, S, D).
        block: Index of the block.
        dense: What was recorded in the forward of the same batch through the dense block; None where nobody asked.
    """

    def __init__(
        self,
        row: SampleRow,
        record: ForwardRecord,
        sites: dict[str, list[str]],
        hidden_in: Tensor,
        hidden_out: Tensor,
        block: int,
        dense: ForwardRecord | None = None,
    ) -> None:
        self.row, self.sites, self.block, self._dense = row, sites, block, dense
        self._record, self._hidden_in, self._hidden_out = record, hidden_in, hidden_out
        self._batch_shape = row.batch.token_shape

    @property
    def sample(self) -> int:
        """Number of the sample in the whole calibration set."""
        return self.row.sample

    def tokens(
        self,
        visual_modalities: Iterable[str] = ("image", "video"),
        needs: Iterable[str] = (),
        asked_by: str = "a callback",
    ) -> Tokens:
        """What plugins see: the sample's real tokens.

        Args:
            visual_modalities: Names of the modalities that count as visual.
            needs: Optional fields to fill, of `lvlm_prune.methods.tokens.NEEDS`; they must have been asked for
                (`needs` of the callback) before the block ran.
            asked_by: Who needs them, for the error.

        Raises:
            RunError: The attention of the block cannot be read.
        """
        needs = frozenset(needs)
        if not needs <= NEEDS:
            raise ValueError(f"{asked_by} needs {sorted(needs - NEEDS)}; there are {sorted(NEEDS)}")
        visual_index, text_index = self.row.indices(*visual_modalities), self.row.indices("text")
        return Tokens(
            hidden_in=self._decoder_tokens(self._hidden_in),
            hidden_out=self._decoder_tokens(self._hidden_out),
            visual=self.row.of(*visual_modalities),
            text=self.row.of("text"),
            visual_index=visual_index,
            text_index=text_index,
            modality=self.row.modality,
            modality_counts=self.row.modality_counts() if "outputs" in needs else None,
            outputs=(
                {name: self._flatten(value)[0] for name, value in self._record.outputs.items()}
                if "outputs" in needs
                else {}
            ),
            **self._attention(needs & ATTENTION_NEEDS, text_index, visual_index, asked_by),
            block=self.block,
            sample=self.sample,
        )

    def site_inputs(self) -> Iterator[SiteInput]:
        """What each site was fed; a Linear that the block calls several times comes once for each call."""
        for site in self.sites:
            calls = self._record.calls_of(site)
            of_dense = [] if self._dense is None else self._dense.calls_of(site)
            for inputs, dense in zip_longest(calls, of_dense[: len(calls)]):
                tokens, repeats = self._flatten(inputs)
                # Tokens that are not the decoder's own may be other ones in the dense model.
                has_dense = dense is not None and repeats > 0 and dense.shape == inputs.shape
                yield SiteInput(site, tokens, repeats, self._flatten(dense)[0] if has_dense else None)

    def routed_inputs(self) -> Iterator[RoutedInput]:
        """What each matrix of a routed expert was fed, with the decoder tokens behind it; needs `tokens.EXPERTS`."""
        batch_size, length = self._batch_shape
        start, real = self.row.row * length, self.row.real
        own = torch.arange(length, device=self.row.modality.device) if real is None else real
        for stack, call in self._record.routed:
            arguments = self.row.batch.arguments[self.block]
            rows = rows_in_call(stack, call, (batch_size, length), arguments, start + own)
            seen = (rows >= 0).nonzero().flatten()
            for routed in stack.inputs(call, rows[seen]):
                yield replace(routed, tokens=seen[routed.tokens])

    def _attention(
        self, needs: frozenset[str], text_index: Tensor, visual_index: Tensor, asked_by: str
    ) -> dict[str, Tensor]:
        if not needs:
            return {}
        call = self_attention(self._record.attention, self._batch_shape, f"block {self.block}", asked_by)
        attention = call.sample(self.row.row, self.row.real)
        every = torch.arange(len(self.row.modality), device=text_index.device)
        computed: dict[str, Callable[[], Tensor]] = {
            "attention_last": lambda: attention.rows(every[-1:])[0],
            "attention_text_to_visual": lambda: attention.mean_of_rows(text_index)[visual_index],
            "attention_mean": lambda: attention.mean_of_rows(every),
            "attention_map": lambda: attention.rows(every),
        }
        return {name: computed[name]() for name in sorted(needs)}

    def _decoder_tokens(self, hidden: Tensor) -> Tensor:
        """(B, S, D), or (images, patches, D) of one sample -> (T, D).

        Parallel streams (k, B, S, D) or (B, S, k, D) -> (T, k D).
        """
        batch_size, length = self._batch_shape
        if hidden.shape[:-1].numel() == batch_size * length:
            return self.row.cut(hidden.reshape(batch_size, length, -1)[self.row.row])
        if hidden.shape[:2] == self._batch_shape:
            return self.row.cut(hidden[self.row.row]).flatten(1)
        streams = self.row.cut(hidden.flatten(0, -4)[:, self.row.row].movedim(0, 1))
        return streams.flatten(1)

    def _flatten(self, value: Tensor) -> tuple[Tensor, int]:
        batch_size, length = self._batch_shape
        channels, row = value.shape[-1], self.row.row
        tokens = value.numel() // max(channels, 1)
        if tokens == batch_size * length:
            return self.row.cut(value.reshape(batch_size, length, channels)[row]), 1
        if value.ndim >= 4 and value.shape[-3:-1] == (batch_size, length):
            streams = value.reshape(-1, batch_size, length, channels)[:, row]
            cut = streams if self.row.real is None else streams[:, self.row.real]
            return cut.reshape(-1, channels), len(streams)
        if value.shape[0] == batch_size:
            return value[row].reshape(-1, channels), 0
        # Tokens that cannot be told apart by sample: they belong to the batch, and its first sample speaks for it.
        return (value if row == 0 else value[:0]).reshape(-1, channels), 0
