"""`pack` and `unpack` from the command line, and what becomes of a packed folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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
from tests.documented import undocumented
from tests.packing import contents, make_sparse, refused, small_checkpoint

pytestmark = pytest.mark.usefixtures("keep_packed")


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
    """A tiny sparse checkpoint."""
    return small_checkpoint(tmp_path / "small")


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


def test_half_a_character_in_the_configuration_comes_back_too(small: Path, tmp_path: Path) -> None:
    config = json.loads((small / "config.json").read_text()) | {"note": "\ud800"}
    (small / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert main(["pack", f"--model.path={small}", f"--output={tmp_path / 'packed'}"]) == 0
    assert main(["unpack", f"--model.path={tmp_path / 'packed'}", f"--output={tmp_path / 'whole'}"]) == 0
    assert (tmp_path / "whole" / "config.json").read_bytes() == (small / "config.json").read_bytes()


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


_LOADER = """
import sys, transformers
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print("loaded", sum(parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.parametrize("order", ["lvlm_prune, transformers", "transformers, lvlm_prune"])
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


def test_every_entry_of_its_record_is_documented(packed: Path) -> None:
    assert not undocumented(packed / "packing.json")
