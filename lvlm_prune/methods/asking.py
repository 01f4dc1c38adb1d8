"""Several pieces of work side by side on a device, which wait for it together.

    work 1 ──kernels──► asks ─┐                 ┌─► goes on ──► ...
    work 2 ──kernels──► asks ─┼─ one copy ──────┼─► goes on ──► ...
    work 3 ──kernels──► asks ─┘  to the host    └─► done

A question that each asks for itself makes a GPU stand still each time.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

T = TypeVar("T")
Asking = Generator[list[Tensor], list[Tensor], T]
"""Work on a device that says now and then which tensors it has to see on the host, and goes on with copies of them."""


def asked_together(askers: Sequence[Asking[T]]) -> list[T]:
    """Carry out several pieces of work side by side: what all of them have to see next comes to the host in one copy.

    Example:
        >>> def twice(number):
        ...     (seen,) = yield [torch.tensor([number])]
        ...     return 2 * seen.item()
        >>> asked_together([twice(1.0), twice(2.0)])
        [2.0, 4.0]
    """
    results: dict[int, T] = {}
    seen: dict[int, list[Tensor]] = {}
    while len(results) < len(askers):
        asked: dict[int, list[Tensor]] = {}
        for number, asker in enumerate(askers):
            if number in results:
                continue
            try:
                asked[number] = asker.send(seen[number]) if number in seen else next(asker)
            except StopIteration as end:
                results[number] = end.value
        if asked:
            seen = _on_host(asked)
    return [results[number] for number in range(len(askers))]


def _on_host(asked: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
    """The tensors on the CPU; from a GPU all of them in one copy."""
    tensors = [tensor for some in asked.values() for tensor in some]
    if not tensors[0].is_cuda:
        return asked
    # As bytes, each padded to where a tensor of any dtype may begin.
    parts = [pad(one.contiguous().view(-1).view(torch.uint8), (0, -one.nbytes % 8)) for one in tensors]
    copied = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
    return {
        number: [next(copied)[: one.nbytes].view(one.dtype).view(one.shape) for one in some]
        for number, some in asked.items()
    }
