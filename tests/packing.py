"""Sparse checkpoints that are packed, and what a packing left."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from tests.hub_folders import write_folder


def make_sparse(folder: Path, sparsity: float = 0.6) -> None:
    """Zero the smallest weights in each row of every Linear of the blocks of a checkpoint, in its files."""
    source = CheckpointFolder(folder)
    for shard in source.shards:
        tensors = load_file(folder / shard)
        for key, tensor in tensors.items():
            if tensor.ndim == 2 and "layers." in key and key.endswith("proj.weight"):
                threshold = tensor.float().abs().kthvalue(int(tensor.shape[1] * sparsity), dim=1, keepdim=True).values
                tensors[key] = tensor.masked_fill(tensor.float().abs() <= threshold, 0.0)
        save_file(tensors, folder / shard, metadata={"format": "pt"})


def small_checkpoint(folder: Path) -> Path:
    """A tiny sharded checkpoint of Qwen2-VL as it lies on the hub, sparse."""
    write_folder(folder, "qwen2_vl", torch.bfloat16)
    make_sparse(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]
