"""Which tensors of a sparse checkpoint are packed, how small they would be, and what stays dense."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lvlm_prune.blocks import find_expert_stacks, find_towers
from lvlm_prune.blocks.decoder import Decoder
from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.checkpoints.sources import find_sources
from lvlm_prune.packed import bitmask
from lvlm_prune.packed.format import COMPANIONS

TOWER, EMBEDDINGS, LINEARS, OTHERS = (
    "vision tower",
    "embeddings and head",
    "Linears with too few zeros",
    "norms, biases and others",
)

# Places of a tensor, and bytes at each, that its share of zeros is estimated from.
_PLACES, _BYTES = 16, 4096


@dataclass(frozen=True)
class PackableTensor:
    """A tensor that can be packed.

    Attributes:
        shape: Its shape on disk.
        dtype: Its dtype on disk.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of its weights."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it is stored, zeros included."""
        return self.size * self.dtype.itemsize

    def packed_bytes(self, zeros: float) -> float:
        """Bytes that it takes as a bitmask.

        Args:
            zeros: Its share of zeros.
        """
        mask = self.size // self.shape[-1] * bitmask.mask_bytes(self.shape[-1])
        return self.size * (1 - zeros) * self.dtype.itemsize + mask


def find_packable(model: Any, decoder: Decoder, folder: CheckpointFolder) -> dict[str, PackableTensor]:
    """Tensors on disk that make Linears or stacks of routed experts of a model, and nothing else.

    The output embedding is left out, since it often is the token embedding as well; so is a subclass of Linear, which
    may do something of its own with its weight.

    Args:
        model: The model on the meta device.
        decoder: The language decoder of the model.
        folder: The checkpoint, for shapes and dtypes on disk.
    """
    wanted = set(_packable_names(model, decoder))
    found = {}
    for source in find_sources(model, folder).values():
        if wanted.issuperset(source.shapes):
            for key in (key for group in source.keys.values() for key in group):
                place = folder[key]
                fits = len(place.shape) in (2, 3) and place.torch_dtype in bitmask.DTYPES and place.nbytes
                # A tensor of one of these names would be taken for a part of a packed one.
                if fits and not any(key + end in folder for end in COMPANIONS):
                    found[key] = PackableTensor(place.shape, place.torch_dtype)
    return found


def _packable_names(model: nn.Module, decoder: Decoder) -> Iterator[str]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            yield f"{name}.weight"
    for path, block in zip(decoder.names, decoder.layers, strict=True):
        for stack in find_expert_stacks(block):
            for parameter in {matrix.parameter for matrix in stack.matrices()}:
                yield f"{path}.{parameter}"


def estimated_zeros(folder: CheckpointFolder, key: str) -> float:
    """Share of zeros of a tensor, from 64 KiB all over it."""
    place = folder[key]
    width = place.torch_dtype.itemsize
    zeros = seen = 0
    with open(folder.path / place.shard, "rb", buffering=0) as file:
        for part in range(_PLACES):
            offset = max(place.nbytes - _BYTES, 0) * part // (_PLACES - 1) // width * width
            file.seek(place.start + offset)
            bits = np.frombuffer(file.read(min(place.nbytes, _BYTES)), dtype=f"u{width}")
            zeros += bits.size - int(np.count_nonzero(bits))
            seen += bits.size
    return zeros / seen


def exact_zeros(folder: CheckpointFolder, key: str) -> float:
    """Share of zeros of a tensor, all of it read."""
    bits = bitmask.as_bits(folder.read(key))
    return 1 - np.count_nonzero(bits) / bits.size


def dense_remainder(model: Any, decoder: Decoder, folder: CheckpointFolder, packed: Collection[str]) -> dict[str, int]:
    """What stays dense: kind of tensor to bytes, the largest first.

    Args:
        model: The skeleton of the model.
        decoder: The language decoder of the model.
        folder: The checkpoint, for sizes on disk.
        packed: Names on disk of what is packed.
    """
    names = {
        key: name
        for name, source in find_sources(model, folder).items()
        for group in source.keys.values()
        for key in group
    }
    kinds = _Kinds(model, decoder)
    sizes: dict[str, int] = {}
    for key in folder:
        if key not in packed:
            kind = kinds.of(names.get(key, ""))
            sizes[kind] = sizes.get(kind, 0) + folder[key].nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


class _Kinds:
    """Tells what a parameter is for."""

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self._towers = tuple(f"{tower.name}." for tower in find_towers(model, decoder) if tower.name)
        embeddings = (model.get_output_embeddings(), model.get_input_embeddings())
        paths: Mapping[int, str] = {id(module): name for name, module in model.named_modules()}
        self._embeddings = {f"{paths[id(module)]}.weight" for module in embeddings if id(module) in paths}
        self._linears = set(_packable_names(model, decoder))

    def of(self, name: str) -> str:
        if name.startswith(self._towers):
            return TOWER
        if name in self._embeddings:
            return EMBEDDINGS
        return LINEARS if name in self._linears else OTHERS
