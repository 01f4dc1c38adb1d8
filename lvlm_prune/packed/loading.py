"""From the files of a packed checkpoint into the modules of a model that transformers is loading.

    model on meta ──place_modules──► PackedLinear, PackedWeight, empty ──transformers loads the rest──► fill_modules

A tensor that is stored as it is used never becomes dense. One that the model uses in another form than it is stored in
(a matrix per expert on disk, a stack of experts in memory) is unpacked, converted as transformers would, and packed
again: one stack at a time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.checkpoints.sources import WeightSource, WithParameters, find_sources
from lvlm_prune.errors import InputError, LVLMPruneError
from lvlm_prune.packed.dense import use_dense_kernels
from lvlm_prune.packed.folder import PackedFolder
from lvlm_prune.packed.format import COMPANIONS
from lvlm_prune.packed.kernels import PackedMatrix, is_faster_packed, kernel_report, pack_rows
from lvlm_prune.packed.linear import PackedLinear, unpack_modules
from lvlm_prune.packed.weight import PackedWeight

log = logging.getLogger(__name__)

_FAILED = "the packed checkpoint cannot be loaded: {}"


@dataclass(frozen=True)
class PackedTarget:
    """Where one packed weight of a model goes.

    Attributes:
        name: The parameter that it takes the place of.
        weight: The packed weight, empty before it is filled.
        source: What it is made from.
    """

    name: str
    weight: PackedWeight
    source: WeightSource


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """In Python nobody gave an option; what is wrong with the folder is a ValueError."""
    try:
        yield
    except LVLMPruneError as error:
        text = f"{error.value}: {error.problem}" if isinstance(error, InputError) else str(error)
        raise ValueError(text) from None


def _with_value_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _as_value_errors():
            return method(*args, **kwargs)

    return wrapped


class PackedLoading:
    """The packed part of loading one model.

    Args:
        model: On the meta device.
        checkpoint_files: Paths of the shards, all in one folder.

    Attributes:
        targets: Every packed weight of the model.
        unpacked: Names of those that are dense in memory, because they are multiplied faster so.

    Raises:
        ValueError: The folder is broken, or the model is another one than it was packed for.
    """

    @_with_value_errors
    def __init__(self, model: Any, checkpoint_files: list[str] | None) -> None:
        if not checkpoint_files:
            raise ValueError(_FAILED.format("it must be a folder with safetensors files"))
        self.model = model
        self.folder = PackedFolder.open(Path(checkpoint_files[0]).parent)
        names = {Path(path).name for path in checkpoint_files}
        if names != set(self.folder.shards):
            raise ValueError(_FAILED.format(f"{', '.join(sorted(names))} is not what its index names"))
        self.targets: list[PackedTarget] = []
        self.unpacked: list[str] = []
        self._sources: list[WeightSource] = []
        self._wanted: dict[str, torch.dtype] = {}

    @property
    def converted(self) -> list[WeightSource]:
        """Sources of the weights that are stored in another form than they are used in.

        Those that share a converter with a packed weight are among them: converters are reverted whole, or not at all.
        """
        of_packed = {id(target.source.converter) for target in self.targets if target.source.converter is not None}
        sources = {id(source): source for source in self._sources if id(source.converter) in of_packed}
        return list(sources.values())

    @_with_value_errors
    def place_modules(self) -> None:
        """Put empty packed modules where the weights go, so that transformers leaves those alone."""
        dtypes, sources = self._dtypes(), find_sources(self.model, self.folder)
        self._sources = list(sources.values())
        for name, source in sources.items():
            keys = [key for group in source.keys.values() for key in group]
            if any(key in self.folder.packed for key in keys):
                nbytes = sum(self._stored_bytes(key) for key in keys) // len(source.shapes)
                self.targets.append(PackedTarget(name, self._place(name, source, nbytes, dtypes), source))
        placed = {key for target in self.targets for group in target.source.keys.values() for key in group}
        if forgotten := sorted(self.folder.packed.keys() - placed):
            problem = f"{type(self.model).__name__} has no use for {forgotten[0]}"
            raise ValueError(_FAILED.format(f"{problem}; unpack it with `lvlm-prune unpack`"))
        self._wanted = {name: dtypes.get(name, parameter.dtype) for name, parameter in self.model.named_parameters()}
        self._hide(placed)

    @_with_value_errors
    def fill_modules(self) -> None:
        """Read, check and lay out every packed weight, one source at a time."""
        self._refuse_offloading()
        by_source: dict[int, list[PackedTarget]] = {}
        for target in self.targets:
            by_source.setdefault(id(target.source), []).append(target)
        for targets in by_source.values():
            source, device = targets[0].source, self._device_of(targets[0].name)
            if source.converter is None and source.key in self.folder.packed:
                targets[0].weight.fill(self._matrices(source.key, targets[0].weight, device))
                continue
            asked: Any = WithParameters(self.model, source.shapes)
            dense = source.load(asked, self.folder, "cpu", targets[0].weight.dtype)
            for target in targets:
                target.weight.fill(_pack(dense.pop(target.name), device))
        for name, parameter in self.model.named_parameters():
            # Beside a quantizer releases before 5.13 leave a weight that has another name on disk in its dtype there.
            if parameter.dtype != self._wanted.get(name, parameter.dtype):
                parameter.data = parameter.data.to(self._wanted[name])
        self._unpack_slow()
        use_dense_kernels(self.model)
        if any(weight.ndim == 3 for weight in self.model.modules() if isinstance(weight, PackedWeight)):
            # One expert after the other unpacks only those that a token is sent to; the other ways need all at once.
            self.model.set_experts_implementation("eager")

    def _unpack_slow(self) -> None:
        """Make dense again what is multiplied faster so; what is saved is packed as before."""
        self.unpacked = unpack_modules(self.model, lambda weight: not is_faster_packed(weight.matrices[0]))
        if self.unpacked:
            count = f"{len(self.unpacked)} of {len(self.targets)} packed weights are dense in memory"
            log.warning(f"{count}: they are multiplied faster so on this machine ({kernel_report()})")

    def _place(self, name: str, source: WeightSource, nbytes: int, dtypes: dict[str, torch.dtype]) -> PackedWeight:
        path, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(path)
        parameter = parent._parameters.get(leaf)
        if parameter is None or tuple(parameter.shape) != source.shapes[name]:
            found = None if parameter is None else tuple(parameter.shape)
            raise ValueError(_FAILED.format(f"{name} has shape {source.shapes[name]} there, {found} in the model"))
        if leaf == "weight" and type(parent) is nn.Linear:
            packed = PackedLinear(parent, nbytes)
            packed.packed._dtype = dtypes.get(name, parameter.dtype)
            grandparent, _, child = path.rpartition(".")
            setattr(self.model.get_submodule(grandparent), child, packed)
            return packed.packed
        if parameter.ndim != 3:
            problem = f"{name} belongs to a {type(parent).__name__}, not to a Linear or a stack of experts"
            raise ValueError(_FAILED.format(f"{problem}; unpack it with `lvlm-prune unpack`"))
        weight = PackedWeight(tuple(parameter.shape), dtypes.get(name, parameter.dtype), nbytes)
        del parent._parameters[leaf]
        parent.add_module(leaf, weight)
        return weight

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Weights that the model keeps in another dtype than the one it is loaded in."""
        parameters = dict(self.model.named_parameters())
        plan = (
            self.model._get_dtype_plan(next(iter(parameters.values())).dtype)
            if hasattr(self.model, "_get_dtype_plan")
            else self.model.dtype_plan  # before release 5.1
        )
        return {
            name: dtype
            for name in parameters
            for part, dtype in plan.items()
            if re.search(rf"(^|\.){part.replace('*', '.*')}(\.|$)", name)
        }

    def _stored_bytes(self, key: str) -> int:
        parts = self.folder.packed.get(key)
        if parts is None:
            return self.folder[key].nbytes
        return sum(self.folder.stored[name].nbytes for name in parts.values())

    def _hide(self, placed: set[str]) -> None:
        """The names that transformers has no place for now are not worth its warning."""
        names = placed | {target.name for target in self.targets}
        prefix = f"{self.model.base_model_prefix}."
        known = sorted({re.escape(name.removeprefix(prefix)) for name in names})
        patterns = {rf"(^|\.)({'|'.join(known)})$", rf"({'|'.join(COMPANIONS)})$"}
        ignored = self.model._keys_to_ignore_on_load_unexpected
        kind = set if isinstance(ignored, set) else list  # a list before release 5.1
        self.model._keys_to_ignore_on_load_unexpected = kind({*patterns, *(ignored or ())})

    def _refuse_offloading(self) -> None:
        devices = {str(device) for device in getattr(self.model, "hf_device_map", {}).values()}
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            problem = "packed weights cannot be offloaded to the CPU or to disk; give a `device_map` without them"
            raise ValueError(_FAILED.format(problem))

    def _device_of(self, name: str) -> torch.device:
        """Where the nearest module around a weight has its other parameters."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            for parameter in self.model.get_submodule(path).parameters():
                if not parameter.is_meta:
                    return parameter.device
        return torch.device("cpu")

    def _matrices(self, key: str, weight: PackedWeight, device: torch.device) -> list[PackedMatrix]:
        values, mask, shape = self.folder.bitmask(key)
        if shape != tuple(weight.shape):
            raise ValueError(_FAILED.format(f"{key} has shape {shape}, {tuple(weight.shape)} in the model"))
        values, mask = values.to(device, weight.dtype), mask.to(device)
        rows, columns = shape[-2:]
        if len(shape) == 2:
            return [PackedMatrix.from_bitmask(values, mask, (rows, columns))]
        counts = _kept(mask)
        return [
            PackedMatrix.from_bitmask(own.clone(), bits.clone(), (rows, columns))
            for own, bits in zip(values.split(counts), mask)
        ]


def _kept(mask: Tensor) -> list[int]:
    """Kept weights of each matrix of a stack."""
    from lvlm_prune.packed.bitmask import count_ones

    return count_ones(mask.cpu()).reshape(len(mask), -1).sum(axis=1).tolist()


def _pack(dense: Tensor, device: torch.device) -> list[PackedMatrix]:
    matrices = dense if dense.ndim == 3 else dense[None]
    return [_packed(matrix, device) for matrix in matrices]


def _packed(matrix: Tensor, device: torch.device) -> PackedMatrix:
    values, mask = pack_rows(matrix.contiguous())
    return PackedMatrix.from_bitmask(values.to(device), mask.to(device), (matrix.shape[0], matrix.shape[1]))
