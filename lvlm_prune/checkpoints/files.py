"""Which files of a checkpoint folder are its weights, and which belong to a copy of it.

model.safetensors                     the weights, as for transformers, whatever else lies beside it
model.safetensors.index.json          else the shards that it names
consolidated*, pytorch_model*, ...    the same weights once more: a copy that is pruned leaves them out
other files with weights, anywhere    so too (`weights_beside.py`)
everything else                       copied as it is
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lvlm_prune.errors import InputError, RunError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_OTHER_FORMATS = (
    "model*.safetensors",
    *("*.safetensors.index.json", "*.bin.index.json"),
    "consolidated*",
    "pytorch_model*",
    *("tf_model*", "flax_model*", "rust_model*", "openvino_model*"),
    *("model*.bin", "model*.pt", "model*.pth"),
    *("*.gguf", "*.ckpt", "*.onnx", "*.onnx_data"),
)
_OTHER_FOLDERS = ("original", "consolidated*", "onnx", "openvino*", "checkpoint-*", "global_step*")


def refuse_undecodable(path: Path, option: str) -> None:
    """Refuse a folder whose name, which may be any bytes, is no text: safetensors and YAML take text.

    Raises:
        InputError: It is none.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(option, path, "is not valid UTF-8, which safetensors wants of a path") from None


def weights_name(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Name of the file that says where the weights are, by transformers' precedence; None where there is none.

    Args:
        folder: The checkpoint folder.
        config: Its configuration, which may name another file as `transformers_weights`.

    Returns:
        Either the one file with all weights or an index of shards.
    """
    named = config.get("transformers_weights")
    candidates = [SINGLE_NAME, INDEX_NAME] if named is None else [str(named)]
    return next((name for name in candidates if (folder / name).is_file()), None)


def is_another_copy(relative: Path, weights: Collection[str]) -> bool:
    """Whether a file is a copy of the weights in another format, or of another time, that nobody loads here.

    Args:
        relative: Its path in the checkpoint folder.
        weights: Names of the files that are loaded: the shards, and their index.

    Example:
        >>> weights = ["model-1.safetensors", "model.safetensors.index.json"]
        >>> [is_another_copy(Path(name), weights) for name in ("pytorch_model.bin", "original/a.pth", "vocab.json")]
        [True, True, False]
    """
    if len(relative.parts) > 1:
        if any(fnmatch(relative.parts[0], pattern) for pattern in _OTHER_FOLDERS):
            return True
    elif relative.name in weights:
        return False
    return any(fnmatch(relative.name, pattern) for pattern in _OTHER_FORMATS)


def files_within(folder: Path) -> Iterator[Path]:
    """Path in a checkpoint folder of every file and link there, in order; hidden ones (caches, git) are left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted([*names, *linked]):
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(folder)


def refuse_special_files(folder: Path, option: str) -> None:
    """Refuse a folder that holds what is neither file, folder nor link: a pipe would be waited for without an end.

    Raises:
        InputError: It does; names the first one.
    """
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(option, folder, f"holds {path.name}, which is no regular file")


def refuse_links_out(folder: Path, files: Collection[Path], option: str) -> None:
    """Refuse links that lead out of a checkpoint folder, but for those that lead into the cache of the hub.

    A copy of the folder would hold what they lead to, whatever that is.

    Args:
        folder: The checkpoint folder.
        files: Paths in it.
        option: Option that the folder came from.

    Raises:
        InputError: A link leads to nothing, to a folder, or out; or a path is no file.
    """
    root = folder.resolve()
    allowed = [root, *_hub_folders(root)]
    for relative in files:
        path = root / relative
        if not path.is_symlink():
            if not path.is_file():
                raise InputError(option, folder, f"holds {relative}, which is no regular file")
            continue
        target = Path(os.path.realpath(path))  # of a circle of links, too
        if not target.is_file():
            raise InputError(option, folder, f"{relative} is a link to {os.readlink(path)}, which is no file")
        if not any(target.is_relative_to(place) for place in allowed):
            problem = f"{relative} is a link that leads out of the checkpoint, to {target}; put the file itself there"
            raise InputError(option, folder, problem)


def opened_without_links(path: str, flags: int) -> int:
    """Open a file for writing that nobody else can have under another name.

    Raises:
        RunError: It is a symbolic link or has several hard links.
    """
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RunError(f"{path} is a link; only files of the run's own are written") from None
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise RunError(f"{path} has another name (a hard link); only files of the run's own are written")
    return descriptor


def opened_without_waiting(path: str, flags: int) -> int:
    """Open a file for reading; a pipe would be waited for.

    Raises:
        RunError: It is no regular file.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise RunError(f"{path} is no regular file")
    return descriptor


def _hub_folders(root: Path) -> list[Path]:
    """Where the files of a downloaded checkpoint are: it is a folder of links to them."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = [Path(HF_HUB_CACHE).resolve()]
    return [*cache, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else cache
