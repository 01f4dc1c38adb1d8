"""Batches of model inputs, and the fingerprint of a calibration set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Inputs = dict[str, Tensor]

# The inputs with one entry per token, and the dimension that counts tokens. They are padded; all others are
# concatenated along dimension 0 and must agree in the remaining ones.
_TOKEN_DIMENSION = {
    "input_ids": 1,
    "attention_mask": 1,
    "token_type_ids": 1,
    "mm_token_type_ids": 1,
    "cross_attention_mask": 1,
    "position_ids": -1,
    "labels": 1,
}


@dataclass
class CalibrationBatch:
    """One batch of calibration samples.

    Args:
        inputs: What `model(**inputs)` takes; `input_ids` is int64 of shape (B, T). Where samples were padded,
            `attention_mask` is 0.
        indices: Number of each row's sample in the selection, 0 ... `num_samples` - 1.
        digests: SHA-256 of each row's sample, see `digest`.
    """

    inputs: Inputs
    indices: list[int]
    digests: list[str]

    def __len__(self) -> int:
        return len(self.indices)


def digest(inputs: Inputs) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of one sample's inputs, before any padding.

    Example:
        >>> digest({"input_ids": torch.tensor([[1, 2]])})[:8] == digest({"input_ids": torch.tensor([[1, 3]])})[:8]
        False
    """
    state = hashlib.sha256()
    for name in sorted(inputs):
        tensor = inputs[name].detach().cpu().contiguous()
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def fingerprint(digests: Iterable[str]) -> str:
    """SHA-256 of a calibration set: of its samples' digests, in the order of their numbers.

    It does not depend on batch size or on the number of processes.
    """
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def batch_key(inputs: Inputs) -> tuple:
    """Samples with equal keys may share a batch: same inputs, and equal shapes but for the number of tokens.

    Padding anything but tokens (patches, tiles, frames) would rely on each model to ignore it; such samples go into
    different batches instead.
    """
    key = []
    for name, tensor in sorted(inputs.items()):
        token_dimension = _token_dimension(name, tensor)
        shape: list[int | None] = list(tensor.shape)
        if tensor.ndim:
            shape[_batch_dimension(name, tensor)] = None
        if token_dimension is not None:
            shape[token_dimension] = None
        # A single number cannot be concatenated: it is shared by samples that agree on it.
        key.append((name, tensor.dtype, tuple(shape), None if tensor.ndim else tensor.item()))
    return tuple(key)


def collate(
    samples: Sequence[Inputs], pad_token_id: int = 0, padding_side: Literal["left", "right"] = "right"
) -> Inputs:
    """One batch from samples with equal `batch_key`.

    Inputs with one entry per token are padded to the longest sample, `input_ids` with `pad_token_id`, `labels` with
    -100, the others with 0; all others are concatenated along dimension 0. `attention_mask` (int64, shape (B, T)) is
    added when samples differ in length and bring none. A single sample stays as it is.

    Example:
        >>> batch = collate([{"input_ids": torch.tensor([[5, 6, 7]])}, {"input_ids": torch.tensor([[8]])}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """
    if len(samples) == 1:
        return dict(samples[0])
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    if len(set(lengths)) > 1 and "attention_mask" not in samples[0]:
        samples = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples]
    batch = {}
    for name, first in samples[0].items():
        tensors = [sample[name] for sample in samples]
        token_dimension = _token_dimension(name, first)
        if token_dimension is not None:
            value = {"input_ids": pad_token_id, "labels": -100}.get(name, 0)
            tensors = [
                _pad(tensor, token_dimension, max(lengths) - length, value, padding_side)
                for tensor, length in zip(tensors, lengths)
            ]
        batch[name] = torch.cat(tensors, dim=_batch_dimension(name, first)) if first.ndim else first
    return batch


def _token_dimension(name: str, tensor: Tensor) -> int | None:
    dimension = _TOKEN_DIMENSION.get(name)
    if dimension is None or tensor.ndim < 2 or (name == "attention_mask" and tensor.ndim > 2):
        return None
    return dimension % tensor.ndim


def _batch_dimension(name: str, tensor: Tensor) -> int:
    # Rotary positions with several axes (time, height, width) have shape (3, B, T).
    return 1 if name == "position_ids" and tensor.ndim == 3 else 0


def _pad(tensor: Tensor, dimension: int, amount: int, value: int, side: str) -> Tensor:
    before_after = (amount, 0) if side == "left" else (0, amount)
    return pad(tensor, (0, 0) * (tensor.ndim - 1 - dimension) + before_after, value=value)
