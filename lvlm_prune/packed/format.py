"""How one packed tensor lies among the tensors of a checkpoint; `docs/packed_format.md` is the description.

Of a tensor `X.weight` of shape (..., rows, columns) the packed checkpoint has

    bitmask    X.weight              (n,)                              the kept weights, in their dtype
               X.weight_mask         (..., rows, ceil(columns / 8))    uint8
               X.weight_shape        (2,) or (3,)                      int64

    coded      X.weight              (n,)                              uint8, sign and mantissa
               X.weight_exponents    (ceil(n / 2),)                    uint8
               X.weight_bases        (rows of all matrices,)           uint8
               X.weight_exceptions   (few,)                            uint8
               X.weight_mask, X.weight_shape                           as above

A reader that does not know the format finds `X.weight` in another shape than the model has, and stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from lvlm_prune.packed import bitmask, coding
from lvlm_prune.packed.coding import CodedValues

METHOD = "lvlm_prune_packed"
"""`quant_method` in `config.json`; `checkpoints.checkpoint.PACKED` where this package cannot be imported."""

VERSION = 1
"""`format_version` that is written, and the only one that is read."""

Format = Literal["bitmask", "coded"]

MASK, SHAPE = "_mask", "_shape"
_CODED = {"exponents": "_exponents", "bases": "_bases", "exceptions": "_exceptions"}
COMPANIONS = (MASK, SHAPE, *_CODED.values())
"""What a packed tensor's name is extended with."""


def encode(dense: Tensor, form: Format) -> dict[str, Tensor] | None:
    """The parts that stand for a tensor; None where it has too few zeros.

    Coded exponents alone make a dense matrix smaller on disk; in memory, where it is a bitmask, it would be larger.

    Args:
        dense: Of shape (rows, columns) or (matrices, rows, columns), on the CPU.
        form: `coded` is for bfloat16; other dtypes, and matrices that it would not make smaller, become `bitmask`.

    Returns:
        Extension of the name, empty for the tensor's own, to part.
    """
    if dense.dtype not in bitmask.DTYPES or dense.ndim not in (2, 3) or not dense.numel():
        return None
    values, mask = bitmask.encode(dense)
    common = {MASK: mask, SHAPE: torch.tensor(dense.shape, dtype=torch.int64)}
    parts = {"": values, **common}
    if sum(part.nbytes for part in parts.values()) >= dense.nbytes:
        return None
    if form == "coded" and dense.dtype == torch.bfloat16:
        coded = coding.encode(values, bitmask.count_ones(mask))
        if coded.nbytes < values.nbytes:
            parts = {"": coded.mantissas, **common, **{end: getattr(coded, name) for name, end in _CODED.items()}}
    return parts


def bitmask_parts(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Kept weights, mask and shape of the whole, of a tensor packed in either form.

    Raises:
        ValueError: The parts do not fit together.
    """
    shape, mask = read_shape(parts[SHAPE]), parts[MASK]
    refuse_misfit({end: tuple(part.shape) for end, part in parts.items()}, shape)
    if not is_coded(parts):
        bitmask.check(parts[""], mask, shape)
        return parts[""], mask, shape
    bitmask.check_count(len(parts[""]), mask, shape)
    coded = CodedValues(parts[""], **{name: parts[end] for name, end in _CODED.items()})
    return coding.decode(coded, bitmask.count_ones(mask)), mask, shape


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor again, bit by bit.

    Raises:
        ValueError: The parts do not fit together.
    """
    return bitmask.decode(*bitmask_parts(parts))


def is_coded(extensions: Collection[str]) -> bool:
    """Whether parts of these extensions are the coded form."""
    return _CODED["exponents"] in extensions


def parts_of(key: str, known: Callable[[str], bool]) -> dict[str, str]:
    """Extension to full name of all parts of the tensor `key`; empty where it is not packed.

    Args:
        key: Its name.
        known: Whether there is a tensor of a name.

    Raises:
        ValueError: Some of the parts are there and others are not.
    """
    found = {end: key + end for end in ("", *COMPANIONS) if known(key + end)}
    if "" not in found or len(found) == 1:
        return {}
    needed = ["", MASK, SHAPE, *(_CODED.values() if any(end in found for end in _CODED.values()) else ())]
    for end in needed:
        if end not in found:
            raise ValueError(f"{key}{end} is missing")
    return found


def read_shape(stored: Tensor) -> tuple[int, ...]:
    """Shape of a packed tensor out of the tensor that says it.

    Raises:
        ValueError: It is none.
    """
    if stored.dtype != torch.int64 or stored.ndim != 1 or len(stored) not in (2, 3):
        raise ValueError(f"its shape is {stored.dtype} of shape {tuple(stored.shape)}, not two or three int64")
    shape = tuple(stored.tolist())
    if min(shape) < 1:
        raise ValueError(f"its shape is {shape}")
    return shape


def refuse_misfit(found: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    """Refuse parts whose shapes, known from the header of a file, do not fit; no part is read for it.

    A mask is as large as its file says, so that a shape that fits it cannot ask for more memory than the file warrants.

    Args:
        found: Extension to shape of each part.
        shape: Shape of the whole.

    Raises:
        ValueError: Says what does not fit.
    """
    expected = (*shape[:-1], bitmask.mask_bytes(shape[-1]))
    if found[MASK] != expected:
        raise ValueError(f"its mask has shape {found[MASK]}, not {expected} as for a tensor of shape {shape}")
    if len(found[""]) != 1 or found[""][0] > math.prod(shape):
        raise ValueError(f"its values have shape {found['']}, for a tensor of shape {shape}")
