import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.checkpoints.checkpoint import INDEX_NAME, SINGLE_NAME
from lvlm_prune.errors import InputError, RunError

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


@pytest.mark.parametrize("order", [1, -1], ids=["the index names the first", "the index names the last"])
def test_a_tensor_in_two_shards_counts_once(order: int, sharded: Path) -> None:
    """transformers takes that of the last shard by name, whatever the index says."""
    first, second = list(SHARDS)[::order]
    key = SHARDS[first][0]
    both = {name: TENSORS[name] for name in SHARDS[second]} | {key: torch.ones_like(TENSORS[key])}
    save_file(both, sharded / second)
    if first < second:
        with pytest.raises(InputError, match=rf"places {re.escape(key)} in {first}, and {second} holds it too"):
            CheckpointFolder(sharded)
    else:
        assert torch.equal(CheckpointFolder(sharded).read(key), TENSORS[key])


def test_a_single_file_counts_before_an_index_as_for_transformers(sharded: Path) -> None:
    save_file({"first.weight": torch.ones(3, 4)}, sharded / SINGLE_NAME)
    checkpoint = CheckpointFolder(sharded)
    assert (checkpoint.shards, list(checkpoint)) == ([SINGLE_NAME], ["first.weight"])
    assert checkpoint.other_copies() == [*SHARDS, INDEX_NAME]


def test_an_index_whose_shards_are_gone_is_no_obstacle_beside_a_single_file(sharded: Path) -> None:
    save_file(TENSORS, sharded / SINGLE_NAME)
    for shard in SHARDS:
        (sharded / shard).unlink()
    assert set(CheckpointFolder(sharded)) == set(TENSORS)


def test_the_file_that_the_configuration_names_counts(sharded: Path) -> None:
    save_file({"first.weight": torch.ones(3, 4)}, sharded / SINGLE_NAME)
    (sharded / "config.json").write_text(json.dumps({"transformers_weights": INDEX_NAME}))
    assert CheckpointFolder(sharded).shards == list(SHARDS)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_copy_leaves_out_files_that_hold_the_same_tensors_under_another_name(layout, request) -> None:
    """Engines that load every safetensors file of a folder would take the dense weights from it."""
    folder = request.getfixturevalue(layout)
    key = next(iter(TENSORS))
    save_file({key: TENSORS[key]}, folder / "backup.safetensors")
    save_file({"voice": torch.ones(2)}, folder / "voices.safetensors")
    (folder / "broken.safetensors").write_text("no header")
    checkpoint = CheckpointFolder(folder)
    assert set(checkpoint.other_copies()) == {"backup.safetensors", "broken.safetensors"}
    assert {"voices.safetensors", "config.json"} < {str(file) for file in checkpoint.files()}


def test_a_copy_leaves_out_the_weights_in_other_formats(sharded: Path) -> None:
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/model.pth", "checkpoint-10/model.safetensors"]
    others += ["model.pth", "consolidated/a.safetensors", "openvino_model.bin", "decoder.onnx_data"]
    kept = ["tokenizer.json", "assets/voice.pt", ".cache/part"]
    for name in (*others, *kept):
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text("")
    torch.save({"speaker": torch.ones(8)}, sharded / "assets/voice.pt")
    checkpoint = CheckpointFolder(sharded)
    found = {str(file) for file in checkpoint.files()}
    assert found == {"tokenizer.json", "assets/voice.pt", "config.json", INDEX_NAME, *SHARDS}
    named = {f"{name.partition('/')[0]}/" if "/" in name else name for name in others}
    assert set(checkpoint.other_copies()) == named


@pytest.mark.parametrize("kind", ["file", "folder", "nothing", "circle"])
def test_links_that_lead_out_are_refused_before_anything_is_copied(kind: str, sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    if kind == "folder":
        outside.mkdir()
    elif kind == "file":
        outside.write_text("secret")
    elif kind == "circle":
        outside = sharded / "notes.txt"
    (sharded / "notes.txt").symlink_to(outside)
    with pytest.raises(InputError, match=r"notes\.txt is a link"):
        CheckpointFolder(sharded).files()


def test_links_into_the_checkpoint_and_into_the_cache_of_the_hub_are_followed(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0a1b"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sharded.iterdir():
        shutil.move(file, blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-of-{file.name}")
    (snapshot / "again.json").symlink_to("config.json")
    assert {str(file) for file in CheckpointFolder(snapshot).files()} == {
        "again.json",
        "config.json",
        INDEX_NAME,
        *SHARDS,
    }


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_nothing_is_written_through_a_link(link: str, single: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    if link == "symbolic":
        (copy / SINGLE_NAME).symlink_to(single / SINGLE_NAME)
    else:
        os.link(single / SINGLE_NAME, copy / SINGLE_NAME)
    before = (single / SINGLE_NAME).read_bytes()
    with pytest.raises(RunError, match="only files of the run's own"):
        CheckpointFolder(single).at(copy).write("first.weight", torch.zeros(3, 4))
    assert (single / SINGLE_NAME).read_bytes() == before


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


def deep_config(folder: Path, levels: int = 100_000) -> None:
    (folder / "config.json").write_text('{"a": ' + "[" * levels + "]" * levels + "}")


def pipe_as_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def pipe_beside(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def weights_elsewhere(folder: Path) -> None:
    (folder / "config.json").write_text('{"transformers_weights": "../single/model.safetensors"}')


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


def index_without_metadata(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["metadata"]
    (folder / INDEX_NAME).write_text(json.dumps(index))


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_elsewhere(folder: Path) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../single/model.safetensors"}}))


def shard_without_a_name(folder: Path) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"a": ""}}))


def index_of_lists(folder: Path) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": ["model-00001-of-00002.safetensors"]}}))


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


def negative_lengths(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (folder / "model-00002-of-00002.safetensors").write_bytes(content)


def odd_header(**changes: Any) -> Callable[[Path], None]:
    """A header as safetensors would not read it, though numbers can be made of what it says."""

    def damage(folder: Path) -> None:
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        header = json.dumps({"__metadata__": {"format": changes.pop("format", "pt")}, "a": entry | changes}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(8)
        (folder / "model-00002-of-00002.safetensors").write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (drop_folder, "no such folder"),
        (file_in_place_of_folder, "is a file, not a folder"),
        (drop_config, "holds no config.json"),
        (break_config, "config.json is not valid JSON"),
        (list_as_config, "config.json is not a JSON object"),
        (deep_config, "config.json is not valid JSON"),
        (partial(deep_config, levels=400), "config.json is nested too deeply"),
        (pipe_as_config, "holds config.json, which is no regular file"),
        (pipe_beside, "holds tokenizer.json, which is no regular file"),
        (adapter_beside, "merge it first"),
        (weights_elsewhere, "no safetensors file in this folder"),
        (drop_weights, "holds no model.safetensors"),
        (only_pickle, "save_pretrained"),
        (break_index, "is not valid JSON"),
        (empty_index, "has no weight_map"),
        (index_without_metadata, "has no metadata"),
        (drop_shard, "model-00002-of-00002.safetensors, which does not exist"),
        (shard_elsewhere, "not a file in this folder"),
        (shard_without_a_name, "names '', which is not a file in this folder"),
        (index_of_lists, "not a file in this folder"),
        (index_with_a_key_too_many, "fourth.weight"),
        (lengthen_shard, "model-00002-of-00002.safetensors is corrupt"),
        *((one, "002.safetensors is truncated") for one in (truncate_shard, truncate_header, empty_shard, huge_header)),
        (garbage_header, "model-00002-of-00002.safetensors has a corrupt header"),
        (negative_lengths, "model-00002-of-00002.safetensors has a corrupt header"),
        (header_that_does_not_fit_itself, "model-00002-of-00002.safetensors has a corrupt header"),
        *((odd_header(shape=shape), "has a corrupt header") for shape in ([2.4], ["2"], [True, 2])),
        (odd_header(data_offsets=[0.0, 8.0]), "has a corrupt header"),
        (odd_header(dtype=32), "has a corrupt header"),
        (odd_header(format=5), "has a corrupt header"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(sharded: Path, damage: Callable[[Path], None], problem: str) -> None:
    damage(sharded)
    with pytest.raises(InputError, match=problem) as caught:
        CheckpointFolder(sharded)
    assert caught.value.option == "model.path"
    assert str(sharded) in str(caught.value)
    assert "\n" not in str(caught.value)
