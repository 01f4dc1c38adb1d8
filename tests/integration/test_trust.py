"""Promises that hold whatever lies in the folders: the input stays as it is, and exit status 0 means verified."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.recipes import with_recipe
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete output whose remaining weights were updated, with statistics."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    arguments = ["--pruning.record=true", "--pruning.scorer=SparseGPTScorer", "--evaluate=true", "--publishable=false"]
    assert main([*GOLDEN_ARGUMENTS, *arguments, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """An output that is pruned up to block 1."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    model = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(GOLDEN / "model", model)
    with pytest.MonkeyPatch.context() as patched:
        really = CheckpointFolder.write
        calls = []

        def stopping(self, key, tensor):
            calls.append(key)
            if len(calls) > 8:
                raise OSError(28, "No space left on device")
            really(self, key, tensor)

        patched.setattr(CheckpointFolder, "write", stopping)
        arguments = ["--pruning.record=true", f"--model.path={model}", f"--output={folder}"]
        assert main([*GOLDEN_ARGUMENTS, *arguments]) == 2
    assert len(json.loads((folder / "pruning.json").read_text())["blocks"]) == 1
    return folder


def resumed(folder: Path, *options: str) -> int:
    model = json.loads((folder / "pruning.json").read_text())["model"]["path"]
    options = [*options, f"--model.path={model}", "--publishable=false"]
    return main([*GOLDEN_ARGUMENTS, *options, f"--output={folder}", "--resume=true"])


def relink(kind: str, file: Path, target: Path) -> None:
    file.unlink()
    if kind == "symbolic":
        file.symlink_to(target)
    else:
        os.link(target, file)


@pytest.mark.parametrize("kind", ["symbolic", "hard", "hard to a third checkpoint"])
@pytest.mark.parametrize("name", ["shard", "config.json.unfinished"])
def test_an_input_is_never_written_through_a_link(kind, name, interrupted, tmp_path, capsys):
    """Tools that remove duplicates put links in the place of files that are equal."""
    folder, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(interrupted, folder)
    shutil.copytree(GOLDEN / "model", model)
    name = CheckpointFolder(model).shards[-1] if name == "shard" else name
    source = model
    if kind == "hard to a third checkpoint":
        if name == "config.json.unfinished":
            pytest.skip("only weights are written in place")
        source = tmp_path / "third"
        shutil.copytree(model, source)
    before = contents(source)
    relink(kind.split()[0], folder / name, source / name.removesuffix(".unfinished"))
    capsys.readouterr()
    options = ["--pruning.record=true", f"--model.path={model}", f"--output={folder}", "--resume=true"]
    assert main([*GOLDEN_ARGUMENTS, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {folder}: {name} is ")
    assert contents(source) == before


def test_a_circle_of_links_in_an_output_is_no_traceback(interrupted, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(interrupted, folder)
    relink("symbolic", folder / "config.json.unfinished", folder / "config.json.unfinished")
    capsys.readouterr()
    assert resumed(folder, "--pruning.record=true") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json.unfinished is a link to " in line


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path, offset: int) -> None:
    os.truncate(path, path.stat().st_size - (1 if path.suffix != ".yaml" else 40))  # lines of YAML need no end


def remove(path: Path, offset: int) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, int], None]] = {"flipped bit": flip, "truncated": truncate, "missing": remove}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["shard", "config.json", "statistics.safetensors", "config.yaml"])
def test_a_complete_folder_is_verified_again(name, damage, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    checkpoint, offset = CheckpointFolder(folder), -2
    linear = next(iter(json.loads((folder / "pruning.json").read_text())["linears"]))
    if name == "shard":
        key = next(key for key in checkpoint if key.endswith(linear.removeprefix("model.language_model.") + ".weight"))
        place, stored = checkpoint[key], checkpoint.read(key)
        kept = int(stored.flatten().nonzero()[0])  # of a weight that SparseGPT updated
        name, offset = place.shard, place.start + kept * stored.element_size()
    damage(folder / name, offset)
    capsys.readouterr()
    options = ["--pruning.record=true", "--pruning.scorer=SparseGPTScorer"]
    assert resumed(folder, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line or linear in line


def test_a_complete_folder_that_is_whole_says_so(finished, capsys):
    before = contents(finished)
    assert resumed(finished, "--pruning.record=true", "--pruning.scorer=SparseGPTScorer") == 0
    assert "\nverified: sparsity 50.02% (target 50%, unstructured), " in capsys.readouterr().out
    assert contents(finished) == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["config.json.unfinished", "statistics.0.part", "config.yaml"])
def test_what_a_run_left_for_itself_is_checked_when_it_goes_on(name, damage, interrupted, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(interrupted, folder)
    damage(folder / name, -2)
    capsys.readouterr()
    assert resumed(folder, "--pruning.record=true") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {folder}: {name} is ")
    assert not (folder / "config.json").exists()


def test_other_copies_of_the_weights_are_left_out_and_that_is_said(tmp_path, capsys):
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(GOLDEN / "model", model)
    (model / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth"):
        (model / name).write_bytes(b"dense")
    magnitude = ["--pruning.scorer=MagnitudeScorer", f"--model.path={model}", f"--output={folder}"]
    assert main([*GOLDEN_ARGUMENTS, *magnitude]) == 0
    assert not (folder / "pytorch_model.bin").exists()
    assert not (folder / "original").exists()
    assert "left out: pytorch_model.bin, original/ (copies of the weights, which are dense)" in capsys.readouterr().out


def test_blocks_that_the_configuration_does_not_count_are_told_of(tmp_path, capsys):
    """transformers leaves them out in silence; some families keep there what predicts tokens further ahead."""
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(GOLDEN / "model", model)
    magnitude = ["--pruning.scorer=MagnitudeScorer", f"--model.path={model}"]
    assert main([*GOLDEN_ARGUMENTS, *magnitude, f"--output={tmp_path / 'whole'}"]) == 0
    assert "warning" not in capsys.readouterr().out
    config = json.loads((model / "config.json").read_text())
    counted = config.get("text_config", config)
    counted["num_hidden_layers"] -= 1
    for name in ("layer_types", "max_window_layers"):
        counted.pop(name, None)
    (model / "config.json").write_text(json.dumps(config))
    assert main([*GOLDEN_ARGUMENTS, *magnitude, f"--output={folder}"]) == 0
    said = capsys.readouterr().out
    assert "config.json counts no block that they are of" in said
    assert f".layers.{counted['num_hidden_layers']}." in said


REFUSED = {
    "adapter": ("adapter_config.json", {}, "merge it first"),
    "announced beside": ("hf_quant_config.json", {"quantization": {}}, "the weights are quantized"),
    "announced within": ("config.json", {"text_config": {"quantization_config": {"bits": 4}}}, "are quantized"),
}


@pytest.mark.parametrize(("name", "content", "problem"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_what_changes_the_weights_is_refused_by_every_command(verb, name, content, problem, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", model)
    earlier = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(earlier | content))
    assert main([verb, f"--model.path={model}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_missing_tensors_are_refused_by_every_command(verb, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", model)
    checkpoint = CheckpointFolder(model)
    tensors = {key: tensor for shard in checkpoint.shards for key, tensor in load_file(model / shard).items()}
    for shard in checkpoint.shards:
        (model / shard).unlink()
    save_file({key: one for key, one in tensors.items() if "embed_tokens" not in key}, model / "model.safetensors")
    options = ["--pruning.scorer=MagnitudeScorer"] if verb == "prune" else []
    assert main([verb, f"--model.path={model}", f"--output={tmp_path / 'out'}", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the checkpoint lacks the tensor" in line
    assert "embed_tokens.weight" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("pool", "kind"), [("TextOnlyPool", "visual"), ("AsymmetricPool", "visual")])
def test_a_pool_that_selects_nothing_is_no_success(pool, kind, tmp_path, capsys):
    """Of a calibration set of images alone nothing is left for a pool of text."""
    token = json.loads((GOLDEN / "model" / "config.json").read_text())["image_token_id"]
    samples = load_file(GOLDEN / "calib.safetensors")
    only = {}
    for number in range(2):
        own = {key: one for key, one in samples.items() if key.startswith(f"s{number}.")}
        ids = own[f"s{number}.input_ids"]
        keep = ids == token
        only |= {key: one[keep][None] if one.shape == ids.shape else one for key, one in own.items()}
    save_file({key: one.contiguous() for key, one in only.items()}, tmp_path / "visual.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'visual.safetensors'}"]
    options = [f"--model.path={GOLDEN / 'model'}", f"--pruning.pool={pool}", f"--output={tmp_path / 'out'}"]
    assert main(["prune", *source, *options, "--report=false"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--pruning.pool {pool}: needs text tokens" in line
    assert not (tmp_path / "out").exists()


def test_a_weight_under_two_names_is_refused(tmp_path, capsys):
    """An older and a newer spelling of a name: one would be pruned, the other may be loaded."""
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", model)
    (shard,) = CheckpointFolder(model).shards
    tensors = load_file(model / shard)
    old = "model.layers.0.self_attn.q_proj.weight"
    new = old.replace("model.", "model.language_model.")
    save_file({**tensors, new: tensors[old].clone()}, model / shard)
    assert main([*GOLDEN_ARGUMENTS, f"--model.path={model}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"holds {new} twice" in line
    assert not (tmp_path / "out").exists()


def test_a_pipe_deep_in_the_checkpoint_is_refused_before_anything_is_written(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", model)
    (model / "assets" / "more").mkdir(parents=True)
    os.mkfifo(model / "assets" / "more" / "pipe")
    assert main([*GOLDEN_ARGUMENTS, f"--model.path={model}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds assets/more/pipe, which is no regular file" in line
    assert not (tmp_path / "out").exists()


def test_what_only_the_model_refuses_names_the_sample_and_can_be_skipped(tmp_path, capsys):
    """Image features that do not match the tokens for them."""
    samples = load_file(GOLDEN / "calib.safetensors")
    ids = samples["s1.input_ids"]
    token = json.loads((GOLDEN / "model" / "config.json").read_text())["image_token_id"]
    assert (ids == token).any()
    samples["s1.input_ids"] = ids.masked_fill(ids == token, 5)
    save_file(samples, tmp_path / "samples.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'samples.safetensors'}"]
    options = [f"--model.path={GOLDEN / 'model'}", "--report=false", "--data.batch_size=2"]
    assert main(["prune", *source, *options, f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sample 1: the model refuses it" in line
    assert not (tmp_path / "out").exists()
    assert main(["prune", *source, *options, f"--output={tmp_path / 'out'}", "--data.on_error=skip"]) == 0
    calibration = json.loads((tmp_path / "out" / "pruning.json").read_text())["calibration"]
    assert (calibration["num_samples"], len(calibration["skipped"])) == (7, 1)


@pytest.mark.parametrize("target", ["language", "vision"])
def test_a_sample_that_overflows_before_the_first_block_can_be_skipped(target, tmp_path, capsys):
    """Of a batch only that one, and of those that are held back for measuring too."""
    samples = load_file(GOLDEN / "calib.safetensors")
    chosen = TensorSource(str(GOLDEN / "calib.safetensors")).choose(5, 0)
    held_back = sorted(set(range(8)) - set(chosen))
    for number in (chosen[1], held_back[0]):
        samples[f"s{number}.pixel_values"][:] = float("nan")
    save_file(samples, tmp_path / "samples.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'samples.safetensors'}"]
    options = [f"--model.path={GOLDEN / 'model'}", "--report=false", "--data.batch_size=2", "--data.num_samples=5"]
    options += [f"--model.targets=[{target}]", "--held_back=3", f"--output={tmp_path / 'out'}"]
    verb = with_recipe(["prune", "--method", "wanda"])
    assert main([*verb, *source, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"sample {chosen[1]}: NaN or infinity before the first block (--data.on_error skip" in line
    assert not (tmp_path / "out").exists()
    assert main([*verb, *source, *options, "--data.on_error=skip"]) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (record["calibration"]["num_samples"], len(record["calibration"]["skipped"])) == (4, 1)
    assert record["quality"]["samples"] == len(held_back) - 1


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a record; of lists, of named Linears and of files only the first one."""
    if isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else [0]
        for key in keys[:1] if path in (("linears",), ("files",)) else keys:
            yield (*path, key)
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("depth", [1, pytest.param(99, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrong", [None, "x"])
@pytest.mark.parametrize("command", [pytest.param("resume", marks=pytest.mark.slow), "compare"])
def test_a_record_of_another_shape_is_no_traceback(command, wrong, depth, finished, tmp_path, capsys):
    """Of what was written by hand, or by another version: one line, or nothing that matters here."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    whole, faults = json.loads((folder / "pruning.json").read_text()), []
    if command == "compare":  # a scored folder; what resumes scores again
        scored = Scores({"color": 0.5}, {"color": 8}, {"color": "vision"})
        kept = retention(scored, scored).to_dict()
        whole["evaluation"] = {"dense": scored.to_dict(), "pruned": scored.to_dict(), "retention": kept}
    for path in (path for path in places(whole) if len(path) <= depth):
        changed = json.loads(json.dumps(whole))
        part = changed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = wrong
        shutil.rmtree(folder)
        shutil.copytree(finished, folder)
        (folder / "pruning.json").write_text(json.dumps(changed))
        capsys.readouterr()
        try:
            status = (
                main(["compare", str(folder), str(folder)]) if command == "compare" else resumed_as(finished, folder)
            )
        except Exception as error:
            faults.append(f"{path}: {type(error).__name__}: {error}")
            continue
        lines = capsys.readouterr().err.splitlines()
        if status not in (0, 2) or len(lines) != (status == 2):
            faults.append(f"{path}: status {status}, {lines}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["left out", "another"])
def test_a_record_of_other_linears_is_not_taken_for_verified(name, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "pruning.json").read_text())
    linear = record["linears"].pop(next(iter(record["linears"])))
    (folder / "pruning.json").write_text(
        json.dumps(record | {"linears": record["linears"] | ({} if name == "left out" else {name: linear})})
    )
    capsys.readouterr()
    assert resumed_as(finished, folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its pruning.json does not name the Linears that are pruned" in line


SAID: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sparsity": lambda record: record["sparsity"].update(achieved=0.9),
    "target": lambda record: record["sparsity"].update(target=0.9),
    "pattern": lambda record: record.update(pattern="2:4"),
    "untouched tensors": lambda record: record["verified"].update(untouched_tensors=3),
    "sparsity of a Linear": lambda record: next(iter(record["linears"].values())).update(achieved=0.9),
    "no zeros of a Linear": lambda record: next(iter(record["linears"].values())).pop("zeros"),
    "no files": lambda record: record.pop("files"),
}


@pytest.mark.parametrize("change", SAID.values(), ids=SAID.keys())
def test_a_complete_folder_is_not_said_to_hold_what_only_its_record_says(change, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "pruning.json").read_text())
    change(record)
    (folder / "pruning.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert resumed_as(finished, folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "record" in line or "its pruning.json " in line


def test_scores_of_another_shape_are_no_traceback(finished, tmp_path, capsys):
    """An `evaluation.json` that is not as `evaluate` writes it says nothing about the checkpoint."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    task = {"score": 0.5, "baseline": 0.5, "retention": 1.0, "questions": 8}
    whole = {"tasks": {"color": task}, "average": 0.5, "baseline_average": 0.5, "retention": 1.0}
    for path in [None, *places(whole)]:
        changed = json.loads(json.dumps(whole))
        if path is not None:
            part = changed
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = "x"
        (folder / "evaluation.json").write_text(json.dumps(changed))
        capsys.readouterr()
        assert main(["compare", str(folder), str(folder)]) == 0, path
        assert ("100.0%" in capsys.readouterr().out) == (path is None), path


def resumed_as(finished: Path, folder: Path) -> int:
    """A run that goes on in a copy of a folder."""
    model = json.loads((finished / "pruning.json").read_text())["model"]["path"]
    options = ["--pruning.record=true", "--pruning.scorer=SparseGPTScorer", "--evaluate=true", f"--model.path={model}"]
    return main([*GOLDEN_ARGUMENTS, *options, f"--output={folder}", "--resume=true"])
