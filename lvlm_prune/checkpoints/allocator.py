"""How glibc's allocator is made to give memory back, so that a run takes what its tensors take.

Elsewhere, and with another allocator, these functions do nothing.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
# As in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_FREE_AT_END = 2**24
# The first is refused by older versions of glibc.
_KEPT = 2**30, 2**25


def give_back_from(nbytes: int = 2**22) -> None:
    """Give the memory of tensors of this size and larger back to the system as soon as they are gone.

    By itself glibc learns to keep pieces of up to 32 MB: what is made and released one by one, first the skeleton's
    parameters and then the blocks, leaves holes behind that add up to several blocks. Once the holes are there they are
    filled again and again, so this is called before the first of them.

    Args:
        nbytes: Less keeps the heap smaller, and makes each new tensor slower.
    """
    if _LIBC is not None:
        _LIBC.mallopt(_M_MMAP_THRESHOLD, nbytes)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, _FREE_AT_END)


def give_back_freed() -> None:
    """Give the memory of smaller tensors that are gone back to the system.

    Their holes lie between tensors that stay, and would add up over the phases of a block.
    """
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


@contextmanager
def keeping_freed() -> Iterator[None]:
    """While the context is open memory of tensors that are gone waits for the next ones, where those are as large.

    A cache that grows by a token is copied to a new place, again and again; pages that the system gives anew each time,
    filled with zeros, take a third of the time of answering questions.
    """
    if _LIBC is None:
        yield
        return
    any(_LIBC.mallopt(_M_MMAP_THRESHOLD, nbytes) for nbytes in _KEPT)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        give_back_from()
        give_back_freed()
