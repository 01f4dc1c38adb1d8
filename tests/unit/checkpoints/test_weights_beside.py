"""What lies beside a checkpoint's own weights: other weights, which no copy takes, and what a model needs."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.checkpoints.checkpoint import SINGLE_NAME
from lvlm_prune.errors import InputError


def _torch(path: Path, tensors: dict, **options) -> None:
    torch.save(tensors, path, **options)


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**26 + 1)


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/model.safetensors", "")


BLOCK = {f"model.layers.{number}.self_attn.q_proj.weight": torch.ones(8, 8) for number in range(2)}
DENSE = {
    **{
        name: lambda path: save_file(BLOCK, path)
        for name in ("backup/model.safetensors", "fp16/a.safetensors", "old/weights", "model.safetensors.old", "w.bak")
    },
    "other names": lambda path: save_file({f"language_{key}": one for key, one in BLOCK.items()}, path),
    "a part.safetensors": lambda path: path.write_bytes(b"\x40\0\0\0\0\0\0\0{" + b" " * 100),
    "step-5/mp_rank_00_model_states.pt": lambda path: _torch(path, {"module": BLOCK}),
    "epoch_3/final.pt": lambda path: _torch(path, BLOCK),
    "ckpt-5/legacy.bin.bak": lambda path: _torch(path, BLOCK, _use_new_zipfile_serialization=False),
    "sub/deep/a.npz": lambda path: np.savez(path, **{key: one.numpy() for key, one in BLOCK.items()}),
    "numpy/model.layers.1.self_attn.q_proj.weight.npy": lambda path: np.save(path, np.ones((8, 8))),
    "sub/a.zip": _zipped,
    **{
        name: lambda path: path.write_bytes(b"dense")
        for name in ("sub/weights.npz", "a.h5", "a.msgpack", "checkpoint_5/x.pth", "x/pytorch_model.bin", "a.onnx.gz")
    },
    "large.data": _large,
}
ADAPTER = {key.replace(".weight", ".lora_A.weight"): torch.ones(64, 512) for key in BLOCK}
NEEDED = {
    "adapter/adapter_model.safetensors": lambda path: save_file(ADAPTER, path),
    "speech-lora/adapter_model.bin": lambda path: _torch(path, ADAPTER),
    "voices/speaker.pt": lambda path: _torch(path, {"speaker": torch.ones(8)}),
    "assets/mel_filters.npz": lambda path: np.savez(path, mel_80=np.ones(8)),
    "voices.safetensors": lambda path: save_file({"voice": torch.ones(2)}, path),
    "training_args.bin": lambda path: _torch(path, {"learning_rate": 1.0}),
    **{
        name: lambda path: path.write_text("{}")
        for name in ("sub/tokenizer.json", "sub/chat_template.jinja", "sub/modeling.py", "tokenizer.model", "vocab.bin")
    },
}


@pytest.mark.parametrize("name", [*DENSE, *NEEDED])
def test_weights_beside_the_checkpoints_own_are_told_by_what_they_are(name: str, tmp_path: Path) -> None:
    """A pruned copy with the dense weights in it is a wrong result, one without its tokenizer no checkpoint."""
    save_file(BLOCK, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (DENSE | NEEDED)[name](tmp_path / name)
    checkpoint = CheckpointFolder(tmp_path)
    assert (Path(name) in checkpoint.files()) == (name in NEEDED)
    top = f"{Path(name).parts[0]}/" if "/" in name else name
    assert checkpoint.other_copies() == ([] if name in NEEDED else [top])


def test_what_git_did_not_fetch_is_said_to_be_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SINGLE_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    with pytest.raises(InputError, match=r"model\.safetensors is only a pointer to the file; fetch it with `git lfs"):
        CheckpointFolder(tmp_path)
