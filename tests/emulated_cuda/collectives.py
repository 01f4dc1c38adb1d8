"""`nccl` between processes on emulated devices: gloo below, and what NCCL refuses above it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as implementation
from torch import Tensor

_UNSUPPORTED = (torch.int16, torch.uint16, torch.complex64)
_NAMES = ("all_reduce", "broadcast", "reduce", "all_gather", "gather", "scatter", "all_gather_into_tensor")
_NAMES += ("reduce_scatter_tensor",)

# Groups that the process believes to be NCCL's, by `id`: they live as long as it does.
_nccl: set[int] = set()


def turn_on() -> None:
    """`nccl` is there from now on, and collectives are as strict as it."""
    _replace("is_nccl_available", lambda original: lambda: True)
    _replace("init_process_group", _starting)
    _replace("new_group", _making)
    _replace("barrier", lambda original: lambda group=None, async_op=False, device_ids=None: original(group))
    for name in _NAMES:
        _replace(name, functools.partial(_strict, name))


def _replace(name: str, replacement: Callable[[Any], Any]) -> None:
    changed = replacement(getattr(implementation, name))
    setattr(dist, name, changed)
    setattr(implementation, name, changed)


def _starting(original: Any) -> Any:
    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        is_nccl = backend is None or "nccl" in str(backend)
        original("gloo" if is_nccl else backend, *args, **kwargs)
        if is_nccl:
            _nccl.add(id(dist.group.WORLD))

    return init_process_group


def _making(original: Any) -> Any:
    @functools.wraps(original)
    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        group = original(ranks, timeout, "gloo", *args, **kwargs)
        if backend == "nccl" or (backend is None and id(dist.group.WORLD) in _nccl):
            _nccl.add(id(group))
        return group

    return new_group


def _strict(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors([*args, *kwargs.values()]))
        group = kwargs.get("group")
        if id(group if group is not None else dist.group.WORLD) in _nccl:
            for tensor in tensors:
                _refuse(name, tensor)
        elif any(tensor.is_cuda for tensor in tensors):
            raise RuntimeError(f"No backend type associated with device type cuda ({name} over gloo)")
        in_host = {id(tensor): tensor.cpu() for tensor in tensors if tensor.is_cuda}

        def on_cpu(value: Any) -> Any:
            if isinstance(value, Tensor):
                return in_host.get(id(value), value)
            return type(value)(map(on_cpu, value)) if isinstance(value, list | tuple) else value

        result = original(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})
        with torch.no_grad():
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.copy_(in_host[id(tensor)])
        return result

    return collective


def _refuse(name: str, tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise RuntimeError(f"No backend type associated with device type cpu ({name} over NCCL)")
    if tensor.dtype in _UNSUPPORTED:
        raise RuntimeError(f"Input tensor data type is not supported for NCCL process group: {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"Tensors must be contiguous ({name} over NCCL)")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
