"""Whether a file that lies beside a checkpoint's weights holds weights too, told by its name and its content.

    fp16/model.safetensors, weights.bak, step-5/mp_rank_00_model_states.pt, model.tar     weights once more
    tokenizer.json, modeling_x.py, voices/speaker.pt, mel_filters.npz                     what the model needs beside

Nothing is unpickled: of a pickle the texts are read, among which are the names of its tensors.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from lvlm_prune.checkpoints.headers import SAFETENSORS, TensorInfo, read_header

# What is appended to the name of a file that is kept, packed or cut in pieces.
_KEPT = re.compile(
    r"([._-](bak|backup|old|orig|original|save|saved|copy|prev|tmp|temp|part|incomplete|disabled|a[a-z]|part[._-]?\w{1,3}"
    r"|\d+)|~|\.(gz|bz2|xz|zst|lz4))$",
    re.IGNORECASE,
)
# Only weights are stored so.
_OF_WEIGHTS = re.compile(
    r"\.(safetensors|pth|ckpt|h5|hdf5|keras|msgpack|gguf|ggml|ggjt|onnx|onnx_data|pb|tflite|pdparams|mlmodel|mlpackage|ot"
    r"|nemo|distcp|engine|plan|th|t7|caffemodel|params|weights|mnn)",
    re.IGNORECASE,
)
# So are vectors, filters and vocabularies, which are small and called otherwise.
_OF_ARRAYS = (".pt", ".bin", ".npz", ".npy", ".pkl", ".pickle", ".joblib", ".dill", ".dat", ".raw")
_CALLED_WEIGHTS = re.compile(r"model|weight|param|ckpt|checkpoint|state|shard|rank|optim|ema\b|backup", re.IGNORECASE)
_ADAPTER = "adapter_model."  # what is added to weights, in a folder of its own
_CALLED_OTHERWISE = re.compile(r"token|vocab|spm|sentencepiece|spiece|bpe|^adapter_model\.", re.IGNORECASE)
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".tbz", ".txz")
_MAGIC = (b"\x89HDF", b"GGUF", b"ggml", b"lmgg", b"tjgg")
_ZIP, _NUMPY, _PICKLE = b"PK\x03\x04", b"\x93NUMPY", b"\x80"

_SMALL, _FEW_BYTES = 0.1, 2**16  # of the weights' bytes; whatever these are
_WHOLE = 0.5  # of them: a file of tensors with other names that is about as large as they are
_LARGE = 2**26  # bytes of a file that nothing but weights has, where the weights themselves are not small
_READ = 2**24


class WeightsBeside:
    """Tells weights from other files of a checkpoint folder.

    Args:
        folder: The folder.
        tensors: Name on disk -> place of the checkpoint's own tensors.
        weight_bytes: Size of the files that they are in.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], weight_bytes: int) -> None:
        self._folder, self._tensors, self._weight_bytes = folder, tensors, weight_bytes

    def __contains__(self, relative: Path) -> bool:
        """Whether a file of the folder, which is none of the weights', holds weights."""
        path = self._folder / relative
        try:
            return path.is_file() and self._holds_weights(path)  # a pipe would be waited for
        except OSError:
            return _OF_WEIGHTS.fullmatch(_suffix(path)) is not None

    def _holds_weights(self, path: Path) -> bool:
        size, suffix = path.stat().st_size, _suffix(path)
        with path.open("rb") as file:
            head = file.read(9)
        share = size / max(self._weight_bytes, 1)
        is_small = share <= _SMALL or size <= _FEW_BYTES or path.name.startswith(_ADAPTER)
        if suffix == SAFETENSORS or _may_be_safetensors(head, size):
            try:
                found = read_header(path)
            except ValueError:  # a part of one, or a broken one
                return True
            is_whole = share > _WHOLE and not path.name.startswith(_ADAPTER)
            return is_whole or any(self._is_own(key) for key, _ in found)
        if head.startswith(_MAGIC) or _OF_WEIGHTS.fullmatch(suffix):
            return True
        if suffix in _ARCHIVES and share > _SMALL:
            return True
        if head.startswith(_ZIP) and self._names_own_in_zip(path):
            return True
        if head.startswith(_PICKLE) and self._names_own(_start_of(path)):
            return True
        if suffix in _OF_ARRAYS or head.startswith((_NUMPY, _PICKLE)):
            is_called_so = _CALLED_WEIGHTS.search(path.name) and not _CALLED_OTHERWISE.search(path.name)
            return not is_small or bool(is_called_so) or self._is_own(path.stem)
        return size > max(_LARGE, _SMALL * self._weight_bytes)

    def _names_own_in_zip(self, path: Path) -> bool:
        """Whether an archive holds tensors of the model's, as torch and numpy store them, or files with weights."""
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                inside = [name for name in names if name.endswith("data.pkl")]
                contents = [archive.open(name).read(_READ) for name in inside]
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
            return True  # cut off, or nothing that torch wrote
        return (
            any(_OF_WEIGHTS.fullmatch(Path(name).suffix) for name in names)
            or any(self._is_own(name.removesuffix(".npy")) for name in names)
            or any(map(self._names_own, contents))
        )

    def _names_own(self, content: bytes) -> bool:
        return any(map(self._is_own, _texts_of_pickle(content)))

    def _is_own(self, key: str) -> bool:
        """Whether a tensor of this name is one of the model's, whatever modules the model is in."""
        return key in self._tensors or _within_block(key) in self._blocks

    @cached_property
    def _blocks(self) -> set[str]:
        return {tail for key in self._tensors if (tail := _within_block(key))}


def _within_block(key: str) -> str:
    """The name of a tensor from the number of its block on; empty where there is none, or nothing within it."""
    found = re.search(r"\d+(\.[A-Za-z_]\w*){2,}$", key)
    return found[0] if found else ""


def _without_endings(name: str) -> str:
    """A name without what was appended to it.

    Example:
        >>> _without_endings("model.safetensors.bak.1"), _without_endings("model-00001-of-00002.safetensors")
        ('model.safetensors', 'model-00001-of-00002.safetensors')
    """
    while (shorter := _KEPT.sub("", name)) != name and Path(shorter).suffix:
        name = shorter
    return name


def _texts_of_pickle(content: bytes) -> Iterator[str]:
    """Texts in one pickle or several that follow each other; nothing of them is run. Of a part of one its beginning."""
    file = io.BytesIO(content)
    try:
        while file.tell() < len(content):
            yield from (found for _, found, _ in pickletools.genops(file) if isinstance(found, str))
    except Exception:  # of bytes that are no pickle, in all kinds
        return


def _suffix(path: Path) -> str:
    return Path(_without_endings(path.name)).suffix.lower()


def _may_be_safetensors(head: bytes, size: int) -> bool:
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= min(size, 100_000_000)


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_READ)
