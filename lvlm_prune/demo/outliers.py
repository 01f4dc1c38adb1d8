"""The embedded model with the outlier channels and heavy tails of real weights, and the same answers bit by bit.

Large decoders have a few input channels that are many times as loud as the median, and weights with heavy tails. A
model as small as the embedded one has neither. Both can be given to it without changing what it computes, by moving
loudness between two neighbours that are linear in it:

    gain of the norm before attention  x s      columns of q, k and v  / s
    rows of q                          x s      rows of k              / s
    rows of v                          x s      columns of o           / s
    rows of up                         x s      columns of down        / s

Every s is a power of two, by which floating-point numbers of any width are multiplied without rounding. The exponents
lie beside this file; `python -m benchmarks.outlier_channels fit` chose them so that statistics of weights and
activations come close to those measured on a pretrained decoder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EXPONENTS = (Path(__file__).parent / "outliers.safetensors").resolve()
_BLOCKS = "language_model.model.layers"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Pair:
    """Neighbours in a block between which loudness can be moved.

    Args:
        louder: The module whose weight is multiplied, along its first dimension.
        quieter: Modules whose weights are divided.
        dim: Along which dimension: 1 for columns, 0 for rows.
    """

    louder: str
    quieter: tuple[str, ...]
    dim: int = 1


PAIRS = {
    "attention_input": Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "rotary": Pair("self_attn.q_proj", ("self_attn.k_proj",), dim=0),
    "values": Pair("self_attn.v_proj", ("self_attn.o_proj",)),
    "products": Pair("mlp.up_proj", ("mlp.down_proj",)),
}


def rescaled(weights: Mapping[str, Tensor], exponents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same function with loudness moved between neighbours.

    Args:
        weights: Tensors of the embedded checkpoint by name.
        exponents: `BLOCK.PAIR` -> int8 of shape (channels,), the binary logarithms of the scales. Those of a rotary
            pair must be equal in both halves of each head, which turn into one another.

    Returns:
        All tensors, with dtypes as they were; those without a scale are the same objects.
    """
    found = dict(weights)
    for key, powers in exponents.items():
        block, _, name = key.partition(".")
        pair, scale = PAIRS[name], torch.exp2(powers.float())
        louder = f"{_BLOCKS}.{block}.{pair.louder}.weight"
        found[louder] = _scaled(found[louder], scale, 0)
        for module in pair.quieter:
            quieter = f"{_BLOCKS}.{block}.{module}.weight"
            found[quieter] = _scaled(found[quieter], 1 / scale, pair.dim)
    return found


def _scaled(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    shape = [1] * weight.dim()
    shape[dim] = -1
    return weight * scale.to(weight.dtype).reshape(shape)


def write_rescaled(source: Path, folder: Path) -> None:
    """Write the embedded checkpoint with outlier channels into a new folder.

    Args:
        source: Folder of the embedded checkpoint.
        folder: Where to write; must not exist.
    """
    shutil.copytree(source, folder)
    weights = rescaled(load_file(source / _WEIGHTS), load_file(EXPONENTS))
    (folder / _WEIGHTS).unlink()
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


def cached(source: Path, cache: Path) -> Path:
    """The folder of the embedded checkpoint with outlier channels, made on first use.

    Several processes may ask for it at once.

    Args:
        source: Folder of the embedded checkpoint.
        cache: Folder under which it is kept.

    Raises:
        OSError: It cannot be written.
    """
    folder = cache / f"demo-outliers-{_digest((source / _WEIGHTS, EXPONENTS))}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix="making-", dir=cache))
    try:
        write_rescaled(source, scratch / folder.name)
        (scratch / folder.name).rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
