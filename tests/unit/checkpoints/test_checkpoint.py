import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.checkpoints.checkpoint import INDEX_NAME, SINGLE_NAME
from lvlm_prune.errors import InputError

TENSORS = {
    "first.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "second.weight": torch.arange(8, dtype=torch.bfloat16).reshape(2, 4),
    "third.half": torch.arange(5, dtype=torch.float16),
    "third.scalar": torch.tensor(7, dtype=torch.int64),
    "third.empty": torch.empty(0, 3),
    "third.flags": torch.tensor([True, False, True]),
}
SHARDS = {
    "model-00001-of-00002.safetensors": ["first.weight", "second.weight"],
    "model-00002-of-00002.safetensors": ["third.half", "third.scalar", "third.empty", "third.flags"],
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    save_file(TENSORS, folder / SINGLE_NAME, metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in two shards with an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    for shard, keys in SHARDS.items():
        save_file({key: TENSORS[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in SHARDS.items() for key in keys}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_safetensors_wrote(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = CheckpointFolder(request.getfixturevalue(layout))
    assert set(checkpoint) == set(TENSORS)
    for key, expected in TENSORS.items():
        tensor = checkpoint.read(key)
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert torch.equal(tensor, expected)
        assert checkpoint[key].nbytes == expected.nbytes


def test_other_safetensors_files_in_the_folder_do_not_count(sharded: Path) -> None:
    save_file({"adapter": torch.ones(2), "first.weight": torch.ones(3, 4)}, sharded / "adapter_model.safetensors")
    (sharded / "zzz.safetensors").write_bytes(b"not safetensors at all")
    checkpoint = CheckpointFolder(sharded)
    assert checkpoint.shards == list(SHARDS)
    assert "adapter" not in checkpoint
    assert torch.equal(checkpoint.read("first.weight"), TENSORS["first.weight"])


def test_the_index_counts_and_not_a_leftover_single_file(sharded: Path) -> None:
    save_file({"first.weight": torch.ones(3, 4)}, sharded / SINGLE_NAME)
    assert CheckpointFolder(sharded).shards == list(SHARDS)


def test_the_index_says_which_of_two_tensors_of_a_name_counts(sharded: Path) -> None:
    second = sharded / "model-00002-of-00002.safetensors"
    save_file({**{key: TENSORS[key] for key in SHARDS[second.name]}, "first.weight": torch.ones(3, 4)}, second)
    assert torch.equal(CheckpointFolder(sharded).read("first.weight"), TENSORS["first.weight"])


@pytest.mark.parametrize("key", ["first.weight", "second.weight", "third.scalar", "third.flags", "third.empty"])
def test_writing_changes_only_the_bytes_of_its_tensor(sharded: Path, key: str) -> None:
    checkpoint = CheckpointFolder(sharded)
    place = checkpoint[key]
    before = {file.name: file.read_bytes() for file in sharded.iterdir()}
    checkpoint.write(key, torch.zeros_like(TENSORS[key]))
    checkpoint.sync([place.shard])
    for file in sharded.iterdir():
        expected = bytearray(before[file.name])
        if file.name == place.shard:
            expected[place.start : place.start + place.nbytes] = bytes(place.nbytes)
        assert file.read_bytes() == expected, file.name
    with safe_open(sharded / place.shard, "pt") as opened:
        assert torch.equal(opened.get_tensor(key), torch.zeros_like(TENSORS[key]))


def test_a_view_is_written_in_its_own_order(single: Path) -> None:
    checkpoint = CheckpointFolder(single)
    transposed = torch.arange(12.0).reshape(4, 3).T
    checkpoint.write("first.weight", transposed)
    assert torch.equal(checkpoint.read("first.weight"), transposed)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 3), torch.zeros(12), torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4).double()],
)
def test_writing_another_shape_or_dtype_is_refused(single: Path, tensor: torch.Tensor) -> None:
    before = (single / SINGLE_NAME).read_bytes()
    with pytest.raises(ValueError, match=r"first\.weight"):
        CheckpointFolder(single).write("first.weight", tensor)
    assert (single / SINGLE_NAME).read_bytes() == before


def drop_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def file_in_place_of_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def list_as_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def drop_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def only_pickle(folder: Path) -> None:
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def break_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text('{"weight_map": {"a"')


def empty_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{}")


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_elsewhere(folder: Path) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../single/model.safetensors"}}))


def index_with_a_key_too_many(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["fourth.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))


def truncate_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def lengthen_shard(folder: Path) -> None:
    with open(folder / "model-00002-of-00002.safetensors", "ab") as file:
        file.write(b"\0")


def truncate_header(folder: Path) -> None:
    os.truncate(folder / "model-00002-of-00002.safetensors", 20)


def empty_shard(folder: Path) -> None:
    os.truncate(folder / "model-00002-of-00002.safetensors", 0)


def garbage_header(folder: Path) -> None:
    header = b"{not json}"
    (folder / "model-00002-of-00002.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def huge_header(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(100))


def header_that_does_not_fit_itself(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    header = json.dumps(dict.fromkeys(SHARDS["model-00002-of-00002.safetensors"], entry)).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (folder / "model-00002-of-00002.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (drop_folder, "no such folder"),
        (file_in_place_of_folder, "is a file, not a folder"),
        (drop_config, "holds no config.json"),
        (break_config, "config.json is not valid JSON"),
        (list_as_config, "config.json is not a JSON object"),
        (drop_weights, "holds no model.safetensors"),
        (only_pickle, "save_pretrained"),
        (break_index, "is not valid JSON"),
        (empty_index, "has no weight_map"),
        (drop_shard, "model-00002-of-00002.safetensors, which does not exist"),
        (shard_elsewhere, "not a file in this folder"),
        (index_with_a_key_too_many, "fourth.weight"),
        (truncate_shard, "model-00002-of-00002.safetensors is truncated"),
        (lengthen_shard, "model-00002-of-00002.safetensors is corrupt"),
        (truncate_header, "model-00002-of-00002.safetensors is truncated"),
        (empty_shard, "model-00002-of-00002.safetensors is truncated"),
        (garbage_header, "model-00002-of-00002.safetensors has a corrupt header"),
        (huge_header, "model-00002-of-00002.safetensors is truncated"),
        (header_that_does_not_fit_itself, "model-00002-of-00002.safetensors has a corrupt header"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(sharded: Path, damage: Callable[[Path], None], problem: str) -> None:
    damage(sharded)
    with pytest.raises(InputError, match=problem) as caught:
        CheckpointFolder(sharded)
    assert caught.value.option == "model.path"
    assert str(sharded) in str(caught.value)
    assert "\n" not in str(caught.value)
