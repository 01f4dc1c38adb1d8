"""A Hugging Face checkpoint folder, read and written one tensor at a time.

A safetensors file is a header of 8 + n bytes that says where each tensor lies, and then the tensors. A pruned weight
has the shape and the dtype of the dense one, so it is written over the same bytes: names, order, shards and sizes stay.
"""

import copy
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.checkpoints.files import (
    INDEX_NAME,
    SINGLE_NAME,
    files_within,
    is_another_copy,
    opened_without_links,
    opened_without_waiting,
    refuse_links_out,
    refuse_special_files,
    refuse_undecodable,
    weights_name,
)
from lvlm_prune.checkpoints.headers import TensorInfo, read_header
from lvlm_prune.checkpoints.unfinished import refuse_unfinished
from lvlm_prune.checkpoints.weights_beside import WeightsBeside
from lvlm_prune.errors import LONGEST_FILE_NAME, InputError, RunError, shortened
from lvlm_prune.option_files import count_values

PACKED = "lvlm_prune_packed"
"""`quant_method` in the `config.json` of a packed checkpoint."""

_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
# Bytes of two folders that are held at once to be compared.
_COMPARED = 2**22
# Places of every tensor, from its first to its last bytes, that the fingerprint is made from.
_FINGERPRINTED = 5


class CheckpointFolder:
    """A checkpoint folder: `config.json`, safetensors shards, and anything else.

    Creating one reads `config.json`, the index and the headers of the shards, and checks that they fit together; no
    tensor is read. The weights are `model.safetensors`, or else the shards that the index names, as for transformers:
    other safetensors files may lie in the folder.

    Args:
        path: The folder.
        option: Name of the option that the path came from, for error messages.

    Attributes:
        path: The folder.
        config: Contents of `config.json`.
        shards: File names of the shards, in the order of the index.
        tensors: Name on disk to place of each tensor.

    Raises:
        InputError: The folder, its configuration or its weights are missing, broken or of another format.
    """

    _seen: Mapping[str, tuple[int, int]] = {}
    """Name of each shard -> its size and time when its header was read; of a copy that is being written nothing."""

    def __init__(self, path: Path | str, option: str = "model.path") -> None:
        self.path = Path(path)
        self._option = option
        if not self.path.is_dir():
            raise self._error("is a file, not a folder" if self.path.exists() else "no such folder")
        refuse_undecodable(self.path, option)
        refuse_special_files(self.path, option)
        refuse_unfinished(self.path, option)
        self.config: dict[str, Any] = self._read_json("config.json")
        self._refuse_adapter()
        self._weights = self._find_weights()
        index = self._read_index()
        self.shards = list(dict.fromkeys(index.values())) if index else [self._weights]
        with suppress(OSError):  # the header of one that is missing says so
            self._seen = {shard: _state((self.path / shard).stat()) for shard in self.shards}
        self.tensors: dict[str, TensorInfo] = {}
        last: dict[str, str] = {}
        for shard in self.shards:
            for key, tensor in self._read_header(shard):
                last[key] = max(shard, last.get(key, shard))
                # Where two shards hold a tensor, the index says which one counts; else it is the last one.
                if index.get(key, last[key]) == shard:
                    self.tensors[key] = tensor
        self._refuse_second_copies(index, last)
        lost = [key for key in index if key not in self.tensors]
        if lost:
            raise self._error(f"{self._weights} places {lost[0]} in {index[lost[0]]}, which does not hold it")

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, key: str) -> TensorInfo:
        return self.tensors[key]

    def read(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor named `key`, in its shape and dtype on disk. Only its own bytes are read.

        Raises:
            RunError: The file has become shorter than its header says, was changed, or cannot be read.
        """
        tensor = self.tensors[key]
        # An empty tensor has no buffer to view.
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.torch_dtype, device=device)
        return torch.frombuffer(self.read_bytes(key), dtype=tensor.torch_dtype).reshape(tensor.shape).to(device)

    def read_bytes(self, key: str) -> bytearray:
        """The bytes of the tensor named `key`, little-endian and row-major.

        Raises:
            RunError: The file has become shorter than its header says, was changed, or cannot be read.
        """
        return next(self._parts(key, max(self.tensors[key].nbytes, 1)), bytearray())

    def same_bytes(self, key: str, other: "CheckpointFolder") -> bool:
        """Whether another folder of the same layout holds the same bytes under `key`; reads 4 MiB at a time.

        Raises:
            RunError: As `read_bytes`.
        """
        pairs = zip(self._parts(key, _COMPARED), other._parts(key, _COMPARED), strict=True)
        return all(own == others for own, others in pairs)

    def is_finite(self, key: str) -> bool:
        """Whether the tensor named `key` is without NaN and infinity; reads 4 MiB at a time.

        Raises:
            RunError: As `read_bytes`.
        """
        dtype = self.tensors[key].torch_dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            return True
        parts = (torch.frombuffer(part, dtype=dtype) for part in self._parts(key, _COMPARED))
        return all(bool(torch.isfinite(torch.stack(part.aminmax())).all()) for part in parts)

    def _parts(self, key: str, size: int) -> Iterator[bytearray]:
        """The bytes of a tensor, `size` at a time."""
        tensor = self.tensors[key]
        try:
            with self._open(tensor.shard) as file:
                file.seek(tensor.start)
                for start in range(0, tensor.nbytes, size):
                    content = bytearray(min(size, tensor.nbytes - start))
                    view, filled = memoryview(content), 0
                    while filled < len(view):
                        count = file.readinto(view[filled:])
                        if not count:
                            raise RunError(f"{self.path / tensor.shard} has become shorter: {key} is cut off")
                        filled += count
                    del view
                    yield content
        except OSError as error:
            raise RunError(f"cannot read {key} from {self.path / tensor.shard}: {error}") from error

    def _open(self, shard: str) -> io.FileIO:
        """A shard for reading.

        Raises:
            RunError: It is another one than when its header was read, or was written to: tensors may lie elsewhere.
            OSError: It cannot be opened.
        """
        file = io.FileIO(self.path / shard, opener=opened_without_waiting)
        found = _state(os.fstat(file.fileno()))
        if self._seen.get(shard, found) != found:
            file.close()
            raise RunError(f"{self.path / shard} was changed while it was in use; begin again once nothing writes it")
        return file

    def write(self, key: str, tensor: Tensor) -> None:
        """Write `tensor` over the one named `key`. Every other byte of the file stays as it is.

        Args:
            key: Name on disk.
            tensor: Of the shape and dtype on disk, on any device.

        Raises:
            ValueError: Shape or dtype differ from the ones on disk.
            OSError: The file cannot be written.
            RunError: The file is a link, or has a second name: what it shares with another checkpoint stays as it is.
        """
        place = self.tensors[key]
        if tuple(tensor.shape) != place.shape or tensor.dtype != place.torch_dtype:
            raise ValueError(
                f"{key} is {place.torch_dtype} of shape {place.shape} on disk, "
                f"not {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        content = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        with open(self.path / place.shard, "r+b", buffering=0, opener=opened_without_links) as file:
            file.seek(place.start)
            written = 0
            while written < len(content):
                written += file.write(content[written:])
        self._seen = {shard: found for shard, found in self._seen.items() if shard != place.shard}

    def sync(self, shards: Iterable[str] | None = None) -> None:
        """Return only once what was written to `shards` (all of them by default) is on the disk.

        Raises:
            OSError: The disk reports an error, for example that it is full.
        """
        for shard in self.shards if shards is None else shards:
            descriptor = os.open(self.path / shard, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files with weights: the size that every command tells of a checkpoint."""
        return sum((self.path / shard).stat().st_size for shard in self.shards)

    def files(self) -> list[Path]:
        """Path in the folder of every file that belongs to a copy of the checkpoint: all but other copies of weights.

        Raises:
            InputError: A link leads out of the folder.
        """
        beside = self._weights_beside()
        found = [file for file in files_within(self.path) if not self._is_another_copy(file, beside)]
        refuse_links_out(self.path, found, self._option)
        return found

    def other_copies(self) -> list[str]:
        """Files with weights beside the checkpoint's own, or folders of nothing else: in another format, or older."""
        files, beside = [*files_within(self.path)], self._weights_beside()
        left_out = {file: self._is_another_copy(file, beside) for file in files}
        whole = {file.parts[0] for file in files} - {file.parts[0] for file in files if not left_out[file]}
        named = (f"{file.parts[0]}/" if len(file.parts) > 1 and file.parts[0] in whole else str(file) for file in files)
        return list(dict.fromkeys(name for name, file in zip(named, files) if left_out[file]))

    def _weights_beside(self) -> WeightsBeside:
        return WeightsBeside(self.path, self.tensors, self.weight_bytes)

    def _is_another_copy(self, file: Path, beside: WeightsBeside) -> bool:
        loaded = [self._weights, *self.shards]
        return is_another_copy(file, loaded) or (str(file) not in loaded and file in beside)

    def at(self, path: Path | str) -> "CheckpointFolder":
        """The same layout in another folder: a copy of the shards, whose `config.json` need not be there yet."""
        twin = copy.copy(self)
        twin.path, twin._seen = Path(path), {}
        return twin

    def refuse_other_layout(self, copied: Path) -> None:
        """Refuse to write into a copy of the shards, made earlier, when the shards are others now.

        Raises:
            InputError: A tensor lies elsewhere.
        """
        twin = self.at(copied)
        for shard in self.shards:
            if not (copied / shard).is_file() or self._read_header(shard) != twin._read_header(shard):
                raise self._error(f"has changed: the unfinished run in {copied} started from another {shard}")

    def fingerprint(self) -> str:
        """SHA-256 over configuration, layout and bytes from all over every tensor: tells another checkpoint apart.

        Reads a few kilobytes per tensor, not the whole checkpoint.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for key, tensor in sorted(self.tensors.items()):
            digest.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
            with self._open(tensor.shard) as file:
                for part in range(_FINGERPRINTED):
                    offset = max(tensor.nbytes - 4096, 0) * part // (_FINGERPRINTED - 1)
                    file.seek(tensor.start + offset)
                    digest.update(file.read(min(tensor.nbytes, 4096)))
        return digest.hexdigest()

    def _error(self, problem: str) -> InputError:
        return InputError(self._option, self.path, problem)

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self._error(f"holds no {name}") from None
        except OSError as error:
            raise self._error(f"cannot read {name}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise self._error(f"{name} is not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise self._error(f"{name} is not a JSON object")
        if name == "config.json":
            try:
                count_values(content)
            except OverflowError:
                raise self._error(f"{name} is nested too deeply, or too long") from None
        return content

    def _refuse_adapter(self) -> None:
        if (self.path / "adapter_config.json").exists():
            raise self._error(
                "holds an adapter (adapter_config.json), which transformers adds to the weights when it loads them; "
                "merge it first: load both with PEFT, `merge_and_unload()`, `save_pretrained`"
            )

    def _find_weights(self) -> str:
        """The file with all weights, or the index of the shards."""
        named = self.config.get("transformers_weights")
        if named is not None:
            kinds = (".safetensors", ".safetensors.index.json")
            if not (isinstance(named, str) and Path(named).name == named and named.endswith(kinds)):
                raise self._error(f"config.json names {named!r} as its weights, no safetensors file in this folder")
        name = weights_name(self.path, self.config)
        if name is None:
            raise self._error(self._without_weights())
        return name

    def _read_index(self) -> dict[str, str]:
        """Name on disk to shard, or nothing for a checkpoint in one file."""
        if not self._weights.endswith(".json"):
            return {}
        content = self._read_json(self._weights)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise self._error(f"{self._weights} has no weight_map")
        for shard in weight_map.values():
            # A name with a folder in it could lead out of the checkpoint.
            if not isinstance(shard, str) or not shard or Path(shard).name != shard or len(shard) > LONGEST_FILE_NAME:
                raise self._error(f"{self._weights} names {shortened(repr(shard))}, which is not a file in this folder")
        for shard in set(weight_map.values()):
            if not (self.path / shard).is_file():
                raise self._error(f"{self._weights} names {shard}, which does not exist")
        if not isinstance(content.get("metadata"), dict):
            problem = (
                f'{self._weights} has no metadata, without which transformers loads no shards; add "metadata": {{}}'
            )
            raise self._error(problem)
        return weight_map

    def _refuse_second_copies(self, index: dict[str, str], last: dict[str, str]) -> None:
        """Of two shards with a tensor transformers takes the last by name, others that of the index."""
        for key, shard in index.items():
            if shard != last.get(key, shard):
                problem = f"{self._weights} places {key} in {shard}, and {last[key]} holds it too"
                raise self._error(f"{problem}; save it anew with transformers, which writes each tensor once")

    def _without_weights(self) -> str:
        pickles = sorted(file.name for pattern in _PICKLE_PATTERNS for file in self.path.glob(pattern))
        if pickles:
            return (
                f"holds weights as pickle ({pickles[0]}), which can run code when opened; convert them first: load the "
                "model with transformers from_pretrained and write it with save_pretrained, which makes safetensors"
            )
        return f"holds no {SINGLE_NAME} and no {INDEX_NAME}"

    def _read_header(self, shard: str) -> list[tuple[str, TensorInfo]]:
        try:
            return read_header(self.path / shard)
        except OSError as error:
            raise self._error(f"cannot read {shard}: {error.strerror}") from None
        except ValueError as error:
            raise self._error(f"{shard} {error}") from None


def _state(found: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written, or another one takes its place."""
    return found.st_size, found.st_mtime_ns
