"""Packing that was interrupted, and folders that somebody changed meanwhile."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

import lvlm_prune  # noqa: F401  (registers the format)
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.packed.linear import PackedLinear
from tests.packing import contents, make_sparse, refused, small_checkpoint

pytestmark = pytest.mark.usefixtures("keep_packed")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A tiny sparse checkpoint."""
    return small_checkpoint(tmp_path / "small")


@pytest.mark.parametrize("verb", ["pack", "unpack"])
@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_run_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, verb: str, after: int
) -> None:
    """A run that dies after any shard cannot be loaded, and ends with the same bytes once it went on."""
    source, whole, output = small, tmp_path / "whole", tmp_path / "output"
    if verb == "unpack":
        source = tmp_path / "packed"
        assert main(["pack", f"--model.path={small}", f"--output={source}"]) == 0
    assert main([verb, f"--model.path={source}", f"--output={whole}"]) == 0
    module = f"lvlm_prune.runs.pack.{'run' if verb == 'pack' else 'unpack'}"
    name = f"{verb}_shard"
    true: Callable[..., object] = getattr(sys.modules[module], name)
    done: list[object] = []

    def dying(*arguments: object) -> object:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(arguments)
        return true(*arguments)

    monkeypatch.setattr(f"{module}.{name}", dying)
    assert main([verb, f"--model.path={source}", f"--output={output}"]) == 130
    assert f"go on with --resume true --output {output}" in capsys.readouterr().err
    assert not (output / "config.json").exists()
    monkeypatch.setattr(f"{module}.{name}", true)
    assert main([verb, f"--model.path={source}", f"--output={output}", "--resume=true"]) == 0
    found, expected = contents(output), contents(whole)
    for folder in (found, expected):
        folder.pop("packing.json", None)  # it has times in it
    assert found == expected


def damages(path: Path) -> dict[str, Callable[[], object]]:
    def flip() -> None:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)

    return {"flipped": flip, "truncated": lambda: os.truncate(path, path.stat().st_size // 2), "missing": path.unlink}


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_what_an_earlier_run_wrote_is_verified_again(small: Path, tmp_path: Path, capsys, verb: str) -> None:
    """Exit status 0 means verified also where nothing was left to do."""
    source, output, kept = small, tmp_path / "output", tmp_path / "kept"
    if verb == "unpack":
        source = tmp_path / "packed"
        assert main(["pack", f"--model.path={small}", f"--output={source}"]) == 0
    arguments = [verb, f"--model.path={source}", f"--output={output}", "--resume=true"]
    assert main([argument for argument in arguments if "resume" not in argument]) == 0
    output.rename(kept)
    shutil.copytree(kept, output)
    assert main(arguments) == 0
    assert contents(output) == contents(kept)
    for name in (CheckpointFolder(kept).shards[0], "config.json", "tokenizer.json", "model.safetensors.index.json"):
        for damage in ("flipped", "truncated", "missing"):
            shutil.rmtree(output)
            shutil.copytree(kept, output)
            damages(output / name)[damage]()
            damaged = contents(output)
            line = refused(capsys, *arguments)
            assert name in line or f"--output {output}" in line, (name, damage)
            assert contents(output) == damaged


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_a_folder_of_somebody_else_is_not_gone_on_with(small: Path, tmp_path: Path, capsys, verb: str) -> None:
    source, output = small, tmp_path / "output"
    if verb == "unpack":
        source = tmp_path / "packed"
        assert main(["pack", f"--model.path={small}", f"--output={source}"]) == 0
    output.mkdir()
    (output / "README.md").write_text("mine")
    assert f"--output {output}: " in refused(
        capsys, verb, f"--model.path={source}", f"--output={output}", "--resume=true"
    )
    assert contents(output) == {"README.md": b"mine"}


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_what_another_run_writes_meanwhile_stays(small: Path, tmp_path: Path, capsys, monkeypatch, verb: str) -> None:
    """Between the first look at the output folder and the first file in it."""
    source, output = small, tmp_path / "output"
    if verb == "unpack":
        source = tmp_path / "packed"
        assert main(["pack", f"--model.path={small}", f"--output={source}"]) == 0
    module = sys.modules[f"lvlm_prune.runs.pack.{'run' if verb == 'pack' else 'unpack'}"]
    claim = module.claim

    def late(folder: Path, *arguments: object) -> object:
        folder.mkdir()
        (folder / "other.json").write_text("{}")
        return claim(folder, *arguments)

    monkeypatch.setattr(module, "claim", late)
    assert "was written by another run meanwhile" in refused(
        capsys, verb, f"--model.path={source}", f"--output={output}"
    )
    assert contents(output) == {"other.json": b"{}"}


RECORDS = ["pruning.json {", "pruning.json []", 'pruning.json {"model": {"path": "llava"}, "seconds": 3}']
RECORDS += ["config.yaml a: [", "config.yaml model: {path: llava, dtype: auto}"]


@pytest.mark.parametrize("change", RECORDS)
def test_a_record_that_somebody_changed_is_one_line(small: Path, tmp_path: Path, capsys, change) -> None:
    """What is private was taken out of it, and is all that may differ."""
    name, _, content = change.partition(" ")
    (small / "pruning.json").write_text('{"model": {"path": "/home/me/llava"}}')
    (small / "config.yaml").write_text("model: {path: /home/me/llava}")
    arguments = ["pack", f"--model.path={small}", f"--output={tmp_path / 'output'}"]
    assert main(arguments) == 0
    (tmp_path / "output" / name).write_text(content)
    assert f"{name} in {tmp_path / 'output'} is not as it was written" in refused(capsys, *arguments, "--resume=true")


def test_shards_of_two_packings_are_refused(small: Path, tmp_path: Path, capsys) -> None:
    """They fit together, and are no model that anybody made."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["pack", f"--model.path={small}", f"--output={first}"]) == 0
    make_sparse(small, 0.8)
    assert main(["pack", f"--model.path={small}", f"--output={second}"]) == 0
    shard = CheckpointFolder(first).shards[0]
    shutil.copy(second / shard, first / shard)
    shutil.copy(second / "model.safetensors.index.json", first)
    line = refused(capsys, "unpack", f"--model.path={first}", f"--output={tmp_path / 'out'}")
    assert f"{shard} is of another packing than packing.json" in line
    assert not (tmp_path / "out").exists()
    (first / "packing.json").unlink()
    assert main(["unpack", f"--model.path={first}", f"--output={tmp_path / 'out'}"]) == 0


def test_a_run_does_not_go_on_with_another_checkpoint(small: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    output = tmp_path / "output"
    monkeypatch.setattr("lvlm_prune.runs.pack.run.pack_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main(["pack", f"--model.path={small}", f"--output={output}"]) == 130
    other = refused(capsys, "pack", f"--model.path={small}", f"--output={output}", "--resume=true", "--format=coded")
    assert "--format coded: the unfinished run" in other
    make_sparse(small, 0.8)
    assert "has changed" in refused(capsys, "pack", f"--model.path={small}", f"--output={output}", "--resume=true")


def test_packing_in_place_goes_on(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any shard the folder can be loaded, whether its other shards are packed or not."""
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.runs.pack import run as pack_run
    from lvlm_prune.runs.pack.in_place import PackInPlace

    dense = contents(small)
    true = pack_run.pack_shard
    done: list[str] = []

    def dying(source: CheckpointFolder, shard: str, *others: object) -> object:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(shard)
        return true(source, shard, *others)

    monkeypatch.setattr(pack_run, "pack_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        PackInPlace(LVLMModule(str(small)), "bitmask", quiet=True)()
    some = AutoModelForImageTextToText.from_pretrained(small)
    monkeypatch.setattr(pack_run, "pack_shard", true)
    PackInPlace(LVLMModule(str(small)), "bitmask", quiet=True)()
    whole = AutoModelForImageTextToText.from_pretrained(small)
    count = [sum(isinstance(module, PackedLinear) for module in model.modules()) for model in (some, whole)]
    assert 0 < count[0] < count[1]
    assert main(["unpack", f"--model.path={small}", f"--output={tmp_path / 'unpacked'}"]) == 0
    assert contents(tmp_path / "unpacked") == dense
