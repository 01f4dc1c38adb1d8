"""The kernels in C++ (`packed.cpp`), called through ctypes.

The library is built when the package is installed and a compiler is there. Without it, or on a machine where it cannot
be loaded, `library()` is None and everything is done in plain torch. Threads come from torch's own OpenMP pool: a
second pool beside it would make both wait for each other.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from lvlm_prune.errors import LVLMPruneError
from lvlm_prune.packed.library_file import library_file

VERSION = 1
"""Of the interface; a library of another version is not used."""

FORCE = "LVLM_PRUNE_KERNELS"
"""Environment variable that names the instruction set to use at most: torch, plain, avx2 or avx512.

Whoever sets it also keeps every weight packed in memory, see `speed`."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the library numbers dtypes."""


class Level(IntEnum):
    """Instruction sets, from the least to the most."""

    TORCH = -1
    PLAIN = 0
    AVX2 = 1
    AVX512 = 2


_forced: Level | None = None
_checked: Level | None = None  # while its kernels are held against torch
_check: Callable[[], bool] = lambda: True  # noqa: E731


def check_with(check: Callable[[], bool]) -> None:
    """Use only instruction sets whose kernels pass a check, which is asked when kernels are first needed."""
    global _check
    _check = check


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, ready to be called; None where it is not built or does not fit."""
    path = library_file()
    if path is None:
        return None
    try:
        return _prepare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):  # built for another machine, or by another version of this package
        return None


def level() -> Level:
    """The instruction set that the kernels use: the best one of this processor, or a lesser one that was asked for."""
    if _checked is not None:
        return _checked
    return min(_best(), _from_environment() if _forced is None else _forced)


def is_forced() -> bool:
    """Whether somebody named the instruction set: they want packed products, also where dense ones are faster."""
    return _forced is not None or bool(os.environ.get(FORCE))


@contextmanager
def limited_to(name: str) -> Iterator[Level]:
    """Use at most this instruction set in a `with` block, for measurements and tests; yields the one that is used."""
    global _forced
    before, _forced = _forced, _parse(name)
    try:
        yield level()
    finally:
        _forced = before


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor on the CPU."""
    return None if tensor is None else tensor.data_ptr()


def _parse(name: str) -> Level:
    names = [level.name.lower() for level in Level]
    if name.lower() not in names:
        raise ValueError(f"{FORCE} is {name!r}; it can be {', '.join(names)}")
    return Level[name.upper()]


@functools.cache
def _best() -> Level:
    """The best instruction set of this processor whose kernels compute what torch does."""
    native = library()
    best = Level.TORCH if native is None else Level(native.lvlm_best_level())
    while best > Level.TORCH and not _agrees(best):
        best = Level(best - 1)
    return best


def _agrees(candidate: Level) -> bool:
    global _checked
    before, _checked = _checked, candidate
    try:
        return _check()
    finally:
        _checked = before


@functools.cache
def _from_environment() -> Level:
    try:
        return _parse(os.environ.get(FORCE) or Level.AVX512.name)
    except ValueError as error:
        raise LVLMPruneError(str(error)) from None


def _prepare(native: ctypes.CDLL) -> ctypes.CDLL | None:
    if native.lvlm_version() != VERSION:
        return None
    address, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures = {
        # mask, rows, columns, offset, threads
        "offsets": [address, number, number, address, small],
        # dense, mask, offset, values, rows, columns, size, level, threads
        "pack": [address] * 4 + [number] * 2 + [small] * 3,
        # values, mask, offset, dense, rows, columns, size, level, threads
        "unpack_rows": [address] * 4 + [number] * 2 + [small] * 3,
        # values, mask, offset, tile_mask, tile_values, start, rows, columns, size, threads
        "tile": [address] * 6 + [number] * 2 + [small] * 2,
        # tile_mask, tile_values, start, mask, offset, values, rows, columns, size, threads
        "untile": [address] * 6 + [number] * 2 + [small] * 2,
        # mask, values, start, rows, columns, kind, from, to, out, as_float, level, threads
        "unpack": [address] * 3 + [number] * 2 + [small, number, number, address] + [small] * 3,
        # mask, values, start, rows, columns, kind, x, x_kind, tokens, bias, bias_kind, y, level, threads
        "linear": [address] * 3
        + [number, number, small, address, small, number, address, small, address, small, small],
        # weight, rows, columns, kind, x, x_kind, y, level, threads
        "dense": [address, number, number, small, address, small, address, small, small],
    }
    for name, arguments in signatures.items():
        getattr(native, f"lvlm_{name}").argtypes = arguments
    native.lvlm_slack.restype = ctypes.c_int64
    native.lvlm_use_pool.argtypes = [address] * 3
    pool = _pool()
    if pool is not None:
        native.lvlm_use_pool(*pool)
    return native


def _pool() -> list[int | None] | None:
    """Three functions of the OpenMP library that torch has loaded, whatever its name; None where it has another one."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(path))
        functions = [loaded.GOMP_parallel, loaded.omp_get_thread_num, loaded.omp_get_num_threads]
    except (OSError, AttributeError):
        return None
    return [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
