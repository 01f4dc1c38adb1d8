"""What a block's attention looks at, while the model goes on running sdpa.

    block ─► attention interface of transformers ─► sdpa           the model's own result, untouched
                       │ queries, keys, mask
                       ▼
              a stripe of softmax(q k^T) at a time ─► rows, or their mean, averaged over heads

Fused attention never forms the heads x T x T map, and neither does this: peak memory is one stripe of at most 128 MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from lvlm_prune.errors import RunError

HELD_ATTENTION = 2**25
"""Elements of heads x rows x T that are held at once."""

# Arguments that change the softmax in a way of their own.
_SPECIAL_ARGUMENTS = ("position_bias", "s_aux", "sinks")


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function on a batch.

    Args:
        module: The attention layer.
        query: Shape (B, heads, Q, D), rotated already.
        key: Shape (B, key heads, K, D); several heads may share one.
        mask: None, (B, K) padding, or (B or 1, heads or 1, Q or 1, K): boolean with True for "may attend", or additive.
        arguments: What else the layer handed over by name (`scaling`, `is_causal`, `softcap`, ...).
        weights: The attention map itself, (B, heads, Q, K), from functions that return it (eager).
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Tensor | None
    arguments: dict[str, Any]
    weights: Tensor | None

    def sample(self, row: int, real: Tensor | None = None) -> SampleAttention:
        """Attention among the tokens of one sample.

        Args:
            row: Its row in the batch.
            real: Its real positions, int64 of shape (T,); None where all are.
        """
        return SampleAttention(self, row, real)


@contextmanager
def recorded_attention(calls: list[AttentionCall]) -> Iterator[None]:
    """Append every attention call to `calls` while the context is open.

    Every function that transformers' attention interface hands out is wrapped, eager attention of a model's own file
    included; no configuration is touched, so the masks stay those of the implementation in use.
    """

    def wrapped(function: Callable) -> Callable:
        if getattr(function, "_records_attention", False):
            return function

        @wraps(function)
        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            *rest: Any,
            **named,
        ) -> Any:
            returned = function(module, query, key, value, attention_mask, *rest, **named)
            calls.append(AttentionCall(module, query, key, attention_mask, named, returned[1]))
            return returned

        attention._records_attention = True  # type: ignore[attr-defined]
        return attention

    # Models ask by `get_interface`; code written for earlier versions indexes.
    originals = {name: AttentionInterface.__dict__.get(name) for name in ("get_interface", "__getitem__")}
    handed_out = {name: getattr(AttentionInterface, name) for name in originals if hasattr(AttentionInterface, name)}
    for name, lookup in handed_out.items():
        replacement = wraps(lookup)(lambda *args, _lookup=lookup, **named: wrapped(_lookup(*args, **named)))
        setattr(AttentionInterface, name, replacement)
    try:
        yield
    finally:
        for name in handed_out:
            if originals[name] is None:
                delattr(AttentionInterface, name)
            else:
                setattr(AttentionInterface, name, originals[name])


def self_attention(calls: Sequence[AttentionCall], shape: Sequence[int], block: str, asked_by: str) -> AttentionCall:
    """The call in which the tokens of the decoder attend to each other.

    Args:
        calls: All attention calls of a block.
        shape: Batch size and number of positions.
        block: Name of the block, for the error.
        asked_by: Who needs its attention, for the error.

    Raises:
        RunError: There is no such call, more than one, or one that cannot be computed from queries and keys.
    """
    among_tokens = [
        call for call in calls if len(call.query) == shape[0] and call.query.shape[2] == call.key.shape[2] == shape[1]
    ]
    problem = None
    if not calls:
        problem = "has no softmax attention that transformers' attention interface computes"
    elif not among_tokens:
        problem = "attends to other things than the decoder's tokens (cross-attention)"
    elif len(among_tokens) > 1:
        problem = f"computes attention {len(among_tokens)} times"
    elif among_tokens[0].weights is None:
        special = [name for name in _SPECIAL_ARGUMENTS if among_tokens[0].arguments.get(name) is not None]
        if special:
            problem = f"adds `{special[0]}` to its attention; it can be read with attn_implementation eager only"
    if problem is not None:
        raise RunError(f"{asked_by} needs the attention of {block}, which {problem}")
    return among_tokens[0]


class SampleAttention:
    """Attention among the T real tokens of one sample, averaged over heads, in float32.

    Args:
        call: The call on the whole batch.
        row: The sample's row in the batch.
        real: Its real positions, int64 of shape (T,); None where all are.

    Example:
        >>> alike = torch.ones(1, 2, 3, 4)
        >>> call = AttentionCall(nn.Identity(), alike, alike[:, :1], None, {}, None)
        >>> SampleAttention(call, row=0).rows(torch.tensor([0, 1]))
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000]])
    """

    def __init__(self, call: AttentionCall, row: int, real: Tensor | None = None) -> None:
        self._call, self._row, self._real = call, row, real
        self._positions = torch.arange(call.key.shape[2], device=call.key.device) if real is None else real

    def rows(self, rows: Tensor) -> Tensor:
        """Attention of tokens `rows` (indices among the real ones, int64) to all real tokens: (len(rows), T)."""
        return torch.cat(list(self._stripes(rows)))

    def mean_of_rows(self, rows: Tensor) -> Tensor:
        """Mean of these rows, float32 of shape (T,); zeros where there are none."""
        total = torch.zeros(len(self._positions), dtype=torch.float32, device=rows.device)
        for stripe in self._stripes(rows):
            total += stripe.sum(0)
        return total / max(len(rows), 1)

    def _stripes(self, rows: Tensor) -> Iterator[Tensor]:
        heads, columns = self._call.query.shape[1], len(self._positions)
        sharing = heads // self._call.key.shape[1]
        rows_at_once = max(1, min(len(rows), HELD_ATTENTION // (columns * sharing)))
        heads_at_once = max(1, HELD_ATTENTION // (rows_at_once * columns * sharing)) * sharing
        for part in rows.split(rows_at_once):
            positions = self._positions[part]
            total = torch.zeros(len(part), columns, dtype=torch.float32, device=rows.device)
            for start in range(0, heads, heads_at_once):
                total += self._softmax(slice(start, start + heads_at_once), positions).sum(0)
            yield total / heads

    def _softmax(self, heads: slice, positions: Tensor) -> Tensor:
        """Attention of these heads, which share whole keys, from these positions to the real ones, (heads, rows, T)."""
        call = self._call
        if call.weights is not None:
            return self._columns(call.weights[self._row, heads][:, positions]).float()
        sharing = call.query.shape[1] // call.key.shape[1]
        query = call.query[self._row, heads][:, positions].float()
        key = call.key[self._row, heads.start // sharing : heads.stop // sharing]
        key = (key if self._real is None else key[:, self._real]).float()
        # Heads that share a key are rows of one product: no key is repeated.
        logits = (query.reshape(len(key), -1, query.shape[-1]) @ key.mT).view(len(query), len(positions), -1)
        scaling = call.arguments.get("scaling")
        logits *= query.shape[-1] ** -0.5 if scaling is None else scaling
        softcap = call.arguments.get("softcap")
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return torch.softmax(self._masked(logits, heads, positions), dim=-1)

    def _columns(self, rows: Tensor) -> Tensor:
        """Real positions of (..., K)."""
        return rows if self._real is None else rows[..., self._real]

    def _masked(self, logits: Tensor, heads: slice, positions: Tensor) -> Tensor:
        call, lowest = self._call, torch.finfo(torch.float32).min
        if call.mask is not None and call.mask.ndim == 4:
            mask = call.mask[self._row if len(call.mask) > 1 else 0]
            mask = mask[heads] if len(mask) > 1 else mask
            mask = self._columns(mask[:, positions] if mask.shape[1] > 1 else mask)
            return logits.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else logits + mask
        # No mask, or one of padding, which is cut away: what is left is said by the layer.
        causal = call.arguments.get("is_causal")
        if not (getattr(call.module, "is_causal", True) if causal is None else causal):
            return logits
        distance = positions[:, None] - self._positions
        hidden = distance < 0
        window = call.arguments.get("sliding_window")
        if window is not None:
            hidden |= distance >= window
        return logits.masked_fill_(hidden, lowest)
