"""`pack` and `unpack` from the command line, and what becomes of a packed folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import lvlm_prune  # noqa: F401  (registers the format)
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.checkpoints.checkpoint import PACKED
from lvlm_prune.cli import main
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.output.units import readable_size
from lvlm_prune.packed.format import METHOD
from lvlm_prune.packed.linear import PackedLinear
from tests.conftest import GOLDEN_ARGUMENTS
from tests.hub_folders import write_folder

pytestmark = pytest.mark.usefixtures("keep_packed")


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


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, 60% sparse in its Linears, with the files that lie beside its weights."""
    folder = tmp_path_factory.mktemp("pack") / "sparse"
    shutil.copytree(CHECKPOINT, folder)
    make_sparse(folder)
    return folder


@pytest.fixture(scope="module")
def packed(sparse: Path) -> Path:
    """The same, packed by the command line."""
    folder = sparse.parent / "packed"
    assert main(["pack", f"--model.path={sparse}", f"--output={folder}"]) == 0
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A tiny sharded checkpoint of Qwen2-VL as it lies on the hub, sparse."""
    folder = tmp_path / "small"
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


def test_the_format_has_one_name() -> None:
    assert PACKED == METHOD


@pytest.mark.parametrize("form", ["bitmask", "coded"])
def test_a_folder_comes_back_byte_for_byte(small: Path, tmp_path: Path, form: str) -> None:
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    assert main(["pack", f"--model.path={small}", f"--output={packed}", f"--format={form}"]) == 0
    assert len(CheckpointFolder(packed).shards) > 1
    assert CheckpointFolder(packed).shards == CheckpointFolder(small).shards
    assert main(["unpack", f"--model.path={packed}", f"--output={unpacked}"]) == 0
    assert contents(unpacked) == contents(small)


def test_what_became_smaller_and_what_stays_is_said(sparse: Path, packed: Path, tmp_path: Path, capsys) -> None:
    assert main(["pack", f"--model.path={sparse}", f"--output={tmp_path / 'again'}"]) == 0
    said = capsys.readouterr().out
    record = json.loads((packed / "packing.json").read_text())
    weights, whole = record["packed"], record["weights"]
    assert weights["dense"] / weights["packed"] > 2
    assert f"{weights['dense'] / weights['packed']:.2f}x smaller · all weights" in said
    assert f"{whole['dense'] / whole['packed']:.2f}x smaller" in said
    assert all(kind in said for kind in ("embeddings and head", "norms, biases and others"))
    dense = CheckpointFolder(sparse)
    assert weights["dense"] + sum(record["dense"].values()) == sum(dense[key].nbytes for key in dense)
    assert (dense.weight_bytes, CheckpointFolder(packed).weight_bytes) == (whole["dense"], whole["packed"])
    assert main(["unpack", f"--model.path={tmp_path / 'again'}", f"--output={tmp_path / 'unpacked'}"]) == 0
    sizes = f"{readable_size(whole['packed'])} → {readable_size(whole['dense'])}"
    assert f"all weights: {sizes}\n" in capsys.readouterr().out


def test_a_packed_model_answers_as_the_sparse_one(sparse: Path, packed: Path) -> None:
    from lvlm_prune.data.processing import load_processor
    from lvlm_prune.evaluation.answers import answer
    from lvlm_prune.evaluation.embedded import EmbeddedBenchmark

    questions = EmbeddedBenchmark().questions[::100]
    processor = load_processor(sparse)
    answers = []
    for folder in (sparse, packed):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        answers.append(answer(model, processor, questions))
    count = json.loads((packed / "packing.json").read_text())["packed"]["tensors"]
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == count >= 42
    assert answers[0] == answers[1]


def test_a_packed_folder_is_evaluated_and_compared(small: Path, tmp_path: Path, capsys) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", f"--model.path={small}", f"--output={packed}"]) == 0
    linears = {
        key.removesuffix(".weight").replace("model.layers", "model.language_model.layers"): {
            "shape": list(CheckpointFolder(small)[key].shape),
            "achieved": 0.6,
            "target": 0.6,
            "pruned": 0,
            "block": int(key.split(".")[2]),
        }
        for key in CheckpointFolder(small)
        if key.startswith("model.layers.") and key.endswith("proj.weight")
    }
    record = {"status": "complete", "linears": linears, "verified": {"sparsity": 0.6, "untouched_tensors": 0}}
    record |= {name: {} for name in ("model", "calibration", "method", "sparsity")}
    for folder in (small, packed):
        (folder / "pruning.json").write_text(json.dumps(record))
    assert main(["compare", str(small), str(packed), f"--output={tmp_path / 'compared'}"]) == 0
    compared = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert compared["overlap"][0]["mean"] == 1.0


@pytest.mark.parametrize("verb", ["prune", "recover", "probe", "sweep", "pack"])
def test_other_verbs_say_that_it_must_be_unpacked(packed: Path, tmp_path: Path, capsys, verb: str) -> None:
    output = tmp_path / "output"
    said = refused(capsys, verb, f"--model.path={packed}", f"--output={output}")
    assert "is a packed checkpoint; unpack it first: `lvlm-prune unpack" in said
    assert not output.exists()


def test_a_dense_checkpoint_is_refused_with_the_number(tmp_path: Path, capsys) -> None:
    for form in ("bitmask", "coded"):
        output = tmp_path / form
        said = refused(capsys, "pack", "--model.path=demo", f"--output={output}", f"--format={form}")
        assert "only 0.0% of the weights of its 68 Linears are zero: packed they would take 1.062 times" in said
        assert not output.exists()


def test_bad_input_is_one_line(sparse: Path, packed: Path, tmp_path: Path, capsys) -> None:
    assert "is not a packed checkpoint" in refused(
        capsys, "unpack", f"--model.path={sparse}", f"--output={tmp_path / 'a'}"
    )
    assert "expected one of bitmask, coded" in refused(
        capsys, "pack", f"--model.path={sparse}", "--format=zip", f"--output={tmp_path / 'a'}"
    )
    finished = refused(capsys, "pack", f"--model.path={sparse}", f"--output={packed}")
    assert "exists and is not empty; choose another folder" in finished, "there is nothing to go on with"
    assert "lies inside the input checkpoint" in refused(
        capsys, "pack", f"--model.path={sparse}", f"--output={sparse / 'inside'}"
    )
    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    tensors = load_file(broken / "model.safetensors")
    key = next(key for key in tensors if key + "_mask" in tensors)
    tensors[key] = tensors[key][:-3].clone()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, "unpack", f"--model.path={broken}", f"--output={tmp_path / 'b'}")
    assert f"{key}: the mask keeps" in said
    assert not (tmp_path / "b" / "config.json").exists()
    assert not (tmp_path / "b" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="the mask keeps"):
        AutoModelForImageTextToText.from_pretrained(broken)
    (broken / "config.json").write_text((packed / "config.json").read_text().replace('version": 1', 'version": 7'))
    assert "format version 7, only version 1 is known" in refused(
        capsys, "unpack", f"--model.path={broken}", f"--output={tmp_path / 'c'}"
    )
    with pytest.raises(ValueError, match="format version 7, only version 1 is known"):
        AutoModelForImageTextToText.from_pretrained(broken)


@pytest.mark.parametrize("changed", ["value", "mask", "dense"])
def test_a_bit_that_changed_since_packing_is_noticed(packed: Path, tmp_path: Path, capsys, changed: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    shard = broken / "model.safetensors"
    content = bytearray(shard.read_bytes())
    folder = CheckpointFolder(broken)
    key = next(key for key in folder if key + "_mask" in folder)
    if changed == "mask":
        masks = folder.read(key + "_mask").flatten()
        at = folder[key + "_mask"].start + next(i for i, byte in enumerate(masks.tolist()) if 0 < byte < 255)
        content[at] = content[at] << 1 & 0xFF | content[at] >> 7  # as many bits, others
    else:
        name = key if changed == "value" else next(k for k in folder if k.endswith("norm.weight"))
        content[folder[name].start] ^= 1
    assert content != shard.read_bytes()
    shard.write_bytes(content)
    said = refused(capsys, "unpack", f"--model.path={broken}", f"--output={tmp_path / 'unpacked'}")
    assert "model.safetensors was changed since it was packed" in said
    assert not (tmp_path / "unpacked" / "model.safetensors").exists()


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


_LOADER = """
import sys, transformers
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print("loaded", sum(parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.parametrize("order", ["lvlm_prune, transformers", "transformers, lvlm_prune", "torch, lvlm_prune"])
def test_importing_the_package_is_enough(packed: Path, order: str) -> None:
    script = f"import {order}\n{_LOADER}"
    child = subprocess.run([sys.executable, "-c", script, str(packed)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert "loaded" in child.stdout


def test_importing_the_package_is_cheap() -> None:
    script = "import sys, lvlm_prune; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_prune_packs_what_it_writes(tmp_path: Path, capsys) -> None:
    """In place; then `--resume true` finds nothing left to do, and unpacking gives the sparse checkpoint."""
    plain, packed, unpacked = (tmp_path / name for name in ("plain", "packed", "unpacked"))
    arguments = [*GOLDEN_ARGUMENTS, "--report=false", "--pruning.sparsity=0.6"]
    assert main([*arguments, f"--output={plain}"]) == 0
    capsys.readouterr()
    assert main([*arguments, f"--output={packed}", "--packed=true"]) == 0
    said = capsys.readouterr().out
    assert "x smaller" in said
    # What comes next is said of the packed folder, once it is.
    _, after = said.split("x smaller", 1)
    first, *others = after[after.index("next: ") :].splitlines()
    assert said.count("next: ") == 1
    assert first.startswith(f"next: lvlm-prune evaluate --model.path {packed} --baseline ")
    assert f"lvlm-prune unpack --model.path {packed}" in [line.strip() for line in others]
    assert main([*arguments, f"--output={packed}", "--packed=true", "--resume=true"]) == 0
    assert capsys.readouterr().out.count("is complete already") == 1
    assert main(["unpack", f"--model.path={packed}", f"--output={unpacked}"]) == 0
    for name in ("config.json", *CheckpointFolder(plain).shards):
        assert (unpacked / name).read_bytes() == (plain / name).read_bytes()


def test_recover_packs_what_it_writes(bases, recover, tmp_path: Path, capsys) -> None:
    """The merged weights of the same recovery, packed where they are; what cannot be packed again is not recovered."""
    base, (plain, packed, unpacked) = (
        bases / "2:4-float32",
        (tmp_path / name for name in ("plain", "packed", "unpacked")),
    )
    assert recover(base, plain) == 0
    assert recover(base, packed, "--packed=true") == 0
    assert "x smaller" in capsys.readouterr().out
    assert main(["unpack", f"--model.path={packed}", f"--output={unpacked}"]) == 0
    for name in ("config.json", *CheckpointFolder(plain).shards):
        assert (unpacked / name).read_bytes() == (plain / name).read_bytes()
    assert recover(packed, tmp_path / "again") == 2
    assert "unpack it first" in capsys.readouterr().err


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
