"""What lies in a checkpoint or a sample that would give a wrong result is refused, or left out and said."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.recipes import with_recipe
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS, MODEL


def test_other_copies_of_the_weights_are_left_out_and_that_is_said(tmp_path, capsys):
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODEL, model)
    (model / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth"):
        (model / name).write_bytes(b"dense")
    magnitude = ["--pruning.scorer=MagnitudeScorer", f"--model.path={model}", f"--output={folder}"]
    assert main([*GOLDEN_ARGUMENTS, *magnitude]) == 0
    assert not (folder / "pytorch_model.bin").exists()
    assert not (folder / "original").exists()
    assert "left out: pytorch_model.bin, original/ (weights beside those that are loaded" in capsys.readouterr().out


def test_every_command_that_copies_a_checkpoint_leaves_out_and_names_other_weights(tmp_path, capsys):
    """Whatever they are called, in whatever folder; what the model needs beside its weights goes along."""
    model, (shard,) = tmp_path / "model", CheckpointFolder(MODEL).shards
    shutil.copytree(MODEL, model)
    for name in ("sub/words.txt", "sub/code.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("needed")

    samples = load_file(GOLDEN / "calib.safetensors")
    samples |= {key.replace("input_ids", "labels"): one.clone() for key, one in samples.items() if "input_ids" in key}
    save_file(samples, labelled := tmp_path / "labelled.safetensors")

    def copied(verb: str, source, *options: str):
        (source / "sub" / "old").mkdir(exist_ok=True)
        shutil.copy(MODEL / shard, source / "sub" / "old" / "weights")
        shutil.copy(MODEL / shard, source / f"{shard}.bak")
        assert main([verb, f"--model.path={source}", f"--output={tmp_path / verb}", *options]) == 0
        assert f"left out: {shard}.bak, sub/old/weights (" in capsys.readouterr().out
        found = {str(file.relative_to(tmp_path / verb)) for file in (tmp_path / verb).rglob("*") if file.is_file()}
        assert not {f"{shard}.bak", "sub/old/weights"} & found
        assert {"sub/words.txt", "sub/code.py"} < found
        return tmp_path / verb

    few = ["--trainer.max_steps=1", "--data.source=TensorSource", f"--data.source.path={labelled}", "--report=false"]
    pruned = copied("prune", model, "--pruning.scorer=MagnitudeScorer", "--report=false", "--pruning.sparsity=0.6")
    copied("unpack", copied("pack", copied("recover", pruned, *few, "--evaluate=false")))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_blocks_that_the_configuration_does_not_count_are_told_of(part, tmp_path, capsys):
    """transformers leaves them out in silence; some families keep there what predicts tokens further ahead."""
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODEL, model)
    magnitude = ["--pruning.scorer=MagnitudeScorer", f"--model.path={model}"]
    assert main([*GOLDEN_ARGUMENTS, *magnitude, f"--output={tmp_path / 'whole'}"]) == 0
    assert "warning" not in capsys.readouterr().out
    config = json.loads((model / "config.json").read_text())
    counted = config[part]
    (count,) = {"num_hidden_layers", "depth"} & set(counted)
    counted[count] -= 1
    for name in ("layer_types", "max_window_layers"):
        counted.pop(name, None)
    (model / "config.json").write_text(json.dumps(config))
    assert main([*GOLDEN_ARGUMENTS, *magnitude, f"--output={folder}"]) == 0
    said = capsys.readouterr().out
    assert "config.json counts no block that they are of" in said
    (first,) = re.findall(r"\(the first is (\S+)\)", said)
    assert ("vis" in first, f".{counted[count]}." in first) == (part == "vision_config", True)


@pytest.mark.parametrize(
    "beside",
    ["weight_scale", "weight_scale_inv", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "qzeros", "SCB"],
)
def test_what_quantization_left_beside_weights_is_told_of(beside, tmp_path, capsys):
    """Whether the weights are whole without it nobody can tell; transformers leaves it out in silence."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (shard,) = CheckpointFolder(model).shards
    tensors = load_file(model / shard)
    name = next(key for key in tensors if key.endswith("q_proj.weight")).removesuffix("weight") + beside
    save_file({**tensors, name: tensors["model.norm.weight"][:1].clone()}, model / shard)
    options = ["--pruning.scorer=MagnitudeScorer", f"--model.path={model}", f"--output={tmp_path / 'out'}"]
    assert main([*GOLDEN_ARGUMENTS, *options]) == 0
    assert f"are those of quantization (the first is {name})" in capsys.readouterr().out


REFUSED = {
    "adapter": ("adapter_config.json", {}, "merge it first"),
    "announced beside": ("hf_quant_config.json", {"quantization": {}}, "the weights are quantized"),
    "announced by a tool": ("quantization_config.json", {"bits": 4}, "the weights are quantized"),
    "announced within": ("config.json", {"text_config": {"quantization_config": {"bits": 4}}}, "are quantized"),
}


@pytest.mark.parametrize(("name", "content", "problem"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_what_changes_the_weights_is_refused_by_every_command(verb, name, content, problem, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    earlier = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(earlier | content))
    assert main([verb, f"--model.path={model}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["null", "[]", '"greedy"', "5"])
@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_what_no_model_could_be_loaded_with_is_refused(verb, content, tmp_path, capsys):
    """A pruned copy of it could not be loaded either."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "generation_config.json").write_text(content)
    assert main([verb, f"--model.path={model}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its generation_config.json cannot be read" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["prune", "recover", "evaluate"])
def test_missing_tensors_are_refused_by_every_command(verb, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
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
    token = json.loads((MODEL / "config.json").read_text())["image_token_id"]
    samples = load_file(GOLDEN / "calib.safetensors")
    only = {}
    for number in range(2):
        own = {key: one for key, one in samples.items() if key.startswith(f"s{number}.")}
        ids = own[f"s{number}.input_ids"]
        keep = ids == token
        only |= {key: one[keep][None] if one.shape == ids.shape else one for key, one in own.items()}
    save_file({key: one.contiguous() for key, one in only.items()}, tmp_path / "visual.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'visual.safetensors'}"]
    options = [f"--model.path={MODEL}", f"--pruning.pool={pool}", f"--output={tmp_path / 'out'}"]
    assert main(["prune", *source, *options, "--report=false"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--pruning.pool {pool}: needs text tokens" in line
    assert not (tmp_path / "out").exists()


def test_a_weight_under_two_names_is_refused(tmp_path, capsys):
    """An older and a newer spelling of a name: one would be pruned, the other may be loaded."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
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
    shutil.copytree(MODEL, model)
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
    token = json.loads((MODEL / "config.json").read_text())["image_token_id"]
    assert (ids == token).any()
    samples["s1.input_ids"] = ids.masked_fill(ids == token, 5)
    save_file(samples, tmp_path / "samples.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'samples.safetensors'}"]
    options = [f"--model.path={MODEL}", "--report=false", "--data.batch_size=2"]
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
    options = [f"--model.path={MODEL}", "--report=false", "--data.batch_size=2", "--data.num_samples=5"]
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


@pytest.mark.parametrize(("broken", "value"), [("pixel_values", float("nan")), ("input_ids", -5)])
def test_in_the_place_of_a_held_back_sample_that_is_broken_comes_another(broken, value, tmp_path, caplog):
    """Whether it shows when the sample is read, or when the model takes it."""
    samples = load_file(GOLDEN / "calib.safetensors")
    data = CalibrationDataModule(TensorSource(str(GOLDEN / "calib.safetensors")), num_samples=2)
    measured, are_others = data.held_back(3)
    first, *others = measured.select()
    assert are_others
    assert len({first, *others, *data.select()}) == 8, "all that the source has stand by"
    samples[f"s{first}.{broken}"] = torch.full_like(samples[f"s{first}.{broken}"], value)
    save_file(samples, tmp_path / "samples.safetensors")
    command = ["prune", f"--model.path={MODEL}", "--data.source=TensorSource", "--data.num_samples=2"]
    command += [f"--data.source.path={tmp_path / 'samples.safetensors'}", "--held_back=3", "--report=false"]
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (record["quality"]["samples"], record["quality"]["held_back"]) == (3, True)
    assert [message for message in caplog.messages if f"left out held-back sample {first}" in message]


@pytest.mark.parametrize(
    ("spoilt", "named"),
    [
        (["lm_head.weight"], "lm_head.weight"),
        (["model.embed_tokens.weight"], "model.embed_tokens.weight"),  # of a token that no sample has
        (
            ["visual.patch_embed.proj.weight", "model.layers.3.self_attn.v_proj.bias"],
            "model.layers.3.self_attn.v_proj.",
        ),
        ([f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)], "and 1 more tensors"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_named_before_anything_goes_through_them(
    spoilt, named, value, tmp_path, capsys
):
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(GOLDEN / "model", model)
    tensors = load_file(model / "model.safetensors")
    for name in spoilt:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    magnitude = ["--pruning.scorer=MagnitudeScorer", f"--model.path={model}", f"--output={folder}"]
    assert main([*GOLDEN_ARGUMENTS, *magnitude]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    (warning,) = json.loads((folder / "pruning.json").read_text())["warnings"]
    assert said == f"warning: {warning}"
    assert warning.startswith("the input has NaN or infinity in ")
    assert named in warning
    # Where samples go through it is refused; what is said of it comes before.
    if "visual.patch_embed.proj.weight" in spoilt:
        assert main([*GOLDEN_ARGUMENTS, f"--model.path={model}", f"--output={tmp_path / 'calibrated'}"]) == 2
        captured = capsys.readouterr()
        assert captured.out.splitlines() == [said]
        assert captured.err.startswith("error: calibration sample 0: NaN or infinity before the first block")
