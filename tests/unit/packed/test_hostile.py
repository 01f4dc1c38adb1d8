"""Packed folders that lie: one line each, and nothing is read that is not there."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.errors import LVLMPruneError
from lvlm_prune.packed import format
from lvlm_prune.packed.folder import PackedFolder
from lvlm_prune.packed.shards import ORIGINAL_HEADER, _order, pack_shard, unpack_shard
from tests.unit.packed.test_format import sparse

CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": format.METHOD, "format_version": 1}}


@pytest.fixture(params=["bitmask", "coded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One packed matrix `x.weight` of 12 x 77, and a dense vector."""
    path = tmp_path / "packed"
    path.mkdir()
    parts = format.encode(sparse((12, 77), torch.bfloat16), request.param)
    assert parts is not None
    tensors = {f"x.weight{end}": part for end, part in parts.items()} | {"norm.weight": torch.ones(8)}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def read_everything(folder: Path) -> None:
    packed = PackedFolder.open(folder)
    for key in packed:
        assert packed.read(key).shape == packed[key].shape


def refusal(folder: Path) -> str:
    """What is said where the folder is opened and everything in it is read."""
    with pytest.raises(LVLMPruneError) as caught:
        read_everything(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def update(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def flip(tensor: Tensor, place: int, bit: int) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[place] ^= 1 << bit
    return tensor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (update("x.weight", lambda values: values[:-1].clone()), "the mask keeps"),
        (update("x.weight", lambda values: torch.cat((values, values))), "the mask keeps"),
        (update("x.weight", lambda values: values.repeat(100)), "for a tensor of shape (12, 77)"),
        (update("x.weight_mask", lambda mask: flip(mask, 3, 1)), "the mask keeps"),
        (update("x.weight_mask", lambda mask: flip(mask, 9, 7)), "beyond its 77 columns"),
        (update("x.weight_mask", lambda mask: mask[:-1].clone()), "its mask has shape (11, 10)"),
        (update("x.weight_mask", lambda mask: mask.to(torch.int16)), "is I16, not U8"),
        (update("x.weight_mask", lambda mask: mask.view(-1)), "its mask has shape (120,)"),
        (update("x.weight_shape", lambda _: torch.tensor([2**40, 77])), f"not ({2**40}, 10)"),
        (update("x.weight_shape", lambda _: torch.tensor([12, 2**62])), "its mask has shape"),
        (update("x.weight_shape", lambda _: torch.tensor([12, -77])), "its shape is (12, -77)"),
        (update("x.weight_shape", lambda _: torch.tensor([0, 77])), "its shape is (0, 77)"),
        (update("x.weight_shape", lambda _: torch.tensor([12])), "not two or three int64"),
        (update("x.weight_shape", lambda _: torch.tensor([12, 70])), "its mask has shape"),
        (update("x.weight_shape", lambda shape: shape.to(torch.int32)), "is I32, not I64"),
        (update("x.weight", lambda values: values.to(torch.int8)), "I8"),
        (update("x.weight", lambda values: values.view(1, -1)), "its values have shape"),
    ],
)
def test_parts_that_do_not_fit(folder: Path, change: Callable[[dict[str, Tensor]], object], said: str) -> None:
    rewrite(folder, change)
    assert said in refusal(folder)


@pytest.mark.parametrize("folder", ["coded"], indirect=True)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (update("x.weight_exponents", lambda codes: codes[:-1].clone()), "the exponents are"),
        (update("x.weight_exponents", lambda codes: torch.cat((codes[:1] | 15, codes[1:]))), "exceptions"),
        (update("x.weight_bases", lambda bases: bases[:-1].clone()), "the bases are"),
        (update("x.weight_bases", lambda bases: torch.zeros_like(bases)), "below zero"),
        (update("x.weight_exceptions", lambda codes: torch.zeros(len(codes) + 1, dtype=torch.uint8)), "exceptions"),
        (update("x.weight_exceptions", lambda codes: codes.to(torch.int64)), "is I64, not U8"),
        (lambda tensors: tensors.pop("x.weight_bases"), "x.weight_bases"),
        (lambda tensors: tensors.pop("x.weight_exceptions"), "x.weight_exceptions"),
    ],
)
def test_codes_that_do_not_fit(folder: Path, change: Callable[[dict[str, Tensor]], object], said: str) -> None:
    rewrite(folder, change)
    assert said in refusal(folder)


@pytest.mark.parametrize("part", ["_mask", "_shape"])
def test_a_part_that_is_missing(folder: Path, part: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"x.weight{part}"))
    assert f"x.weight{part}" in refusal(folder)


@pytest.mark.parametrize("version", [0, 2, None, "1", [1]])
def test_an_unknown_version(folder: Path, version: object) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": format.METHOD, "format_version": version}}
    (folder / "config.json").write_text(json.dumps(config))
    assert f"format version {version}" in refusal(folder)


def test_a_dense_folder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "is not a packed checkpoint" in refusal(folder)


def test_a_file_that_is_cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-20])
    assert "truncated" in refusal(folder)


def test_any_changed_byte_is_refused_or_gives_tensors_of_the_same_shape(folder: Path) -> None:
    """Of 400 folders with a few changed bytes, none ends in anything but a line or a tensor."""
    content = (folder / "model.safetensors").read_bytes()
    generator = random.Random(0)
    refused = []
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        (folder / "model.safetensors").write_bytes(changed)
        try:
            read_everything(folder)
        except LVLMPruneError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not any("\n" in line for line in refused)


def test_a_shard_that_lies_about_its_origin(tmp_path: Path) -> None:
    """The header to restore must be one of the tensors that are there: it would be written as it is."""
    dense, packed, unpacked = (tmp_path / name for name in ("dense", "packed", "unpacked"))
    for path in (dense, packed, unpacked):
        path.mkdir()
    save_file({"x.weight": sparse((12, 77), torch.bfloat16)}, dense / "model.safetensors")
    (dense / "config.json").write_text("{}")
    pack_shard(CheckpointFolder(dense), "model.safetensors", packed, {"x.weight"}, "bitmask")
    content = (packed / "model.safetensors").read_bytes()
    assert ORIGINAL_HEADER.encode() in content
    for true, false in ((b"[12,77]", b"[77,12]"), (b"[0,1848]", b"[0,1849]"), (rb"{\"x.weight", rb"{\"y.weight")):
        assert content.count(true) == 1
        (packed / "model.safetensors").write_bytes(content.replace(true, false))
        with pytest.raises(LVLMPruneError, match="was made from a file with other tensors"):
            unpack_shard(packed, "model.safetensors", unpacked)
        assert not list(unpacked.iterdir())


def test_a_header_to_restore_that_is_nested_without_end_is_refused(folder: Path) -> None:
    with pytest.raises(LVLMPruneError, match="was made from a file with other tensors"):
        _order(PackedFolder.open(folder), "[" * 10**5)
