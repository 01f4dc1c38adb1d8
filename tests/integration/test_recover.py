"""Recovery through the command line: zeros stay zeros, runs can be killed, mistakes are one line."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lvlm_prune.callbacks import FrozenMasks
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.module import LVLMModule
from lvlm_prune.output import progress
from lvlm_prune.recovery import load_sparse_adapter
from tests.conftest import GOLDEN, REPOSITORY

CALIBRATION = GOLDEN / "calib.safetensors"


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder)


def first_inputs(dtype):
    source = TensorSource(str(CALIBRATION))
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in source[0].items()}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_stay_positive_zeros_and_all_else_stays_where_it_was(pattern, dtype, method, bases, recover, tmp_path):
    base, output = bases / f"{pattern}-{dtype}", tmp_path / "out"
    assert (
        recover(base, output, f"--method={method}", "--trainer.max_epochs=2", "--optimization.learning_rate=0.01") == 0
    )
    before, after = CheckpointFolder(base), CheckpointFolder(output)
    assert before.shards == after.shards
    assert len(before.shards) > 1
    assert before.tensors == after.tensors
    assert len(json.loads((output / "recovery.json").read_text())["linears"]) == 12
    changed = [key for key in before if before.read_bytes(key) != after.read_bytes(key)]
    assert len(changed) == 12
    for key in changed:
        one, other = before.read(key), after.read(key)
        bits = other.view({4: torch.int32, 2: torch.int16}[other.element_size()])
        assert (bits[one == 0] == 0).all(), key
        assert other.dtype == getattr(torch, dtype)
        if pattern == "2:4":
            assert ((other.reshape(-1, 4) == 0).sum(1) >= 2).all()
        else:
            assert torch.equal(one == 0, other == 0)
    config = json.loads((output / "config.json").read_text())
    assert "sparsity_config" not in config
    assert "compression_config" not in config
    assert not (output / "checkpoints").exists()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.1)])
def test_adapter_and_merged_checkpoint_are_the_same_model(dtype, tolerance, bases, recover, tmp_path):
    base, output = bases / f"2:4-{dtype}", tmp_path / "out"
    assert recover(base, output, "--optimization.learning_rate=0.003", "--lora.rank=4") == 0
    path = Path("adapter", "adapter_config.json")
    beside = output.with_name("out.private")
    bases_named = [json.loads((folder / path).read_text())["base_model_name_or_path"] for folder in (output, beside)]
    assert bases_named == [base.name, str(base)], "no path in the folder that is published"
    assert "load_sparse_adapter" in (output / "adapter" / "README.md").read_text()
    assert "then trained to give back accuracy" in (output / "README.md").read_text()
    inputs = first_inputs(getattr(torch, dtype))
    merged, pruned = logits(load(output), inputs), logits(load(base), inputs)
    tuned = load_sparse_adapter(load(base), output / "adapter")
    assert (logits(tuned, inputs) - merged).abs().max() <= tolerance
    assert (merged - pruned).abs().max() > 10 * tolerance or dtype == "bfloat16"
    unloaded, written = tuned.merge_and_unload().state_dict(), load(output).state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in unloaded.items())


def test_what_is_no_terminal_gets_lines_and_no_bar(bases, recover, tmp_path, capfd, monkeypatch):
    base, bar = bases / "unstructured-float32", "--trainer.enable_progress_bar=true"
    assert recover(base, tmp_path / "quick", bar, "--evaluate=true") == 0
    said = capfd.readouterr()
    begins = [line.split()[0] for line in said.out.splitlines()]
    assert begins == [
        "recovered",
        "verified:",
        "on",
        "wrote",
        "next:",
        "--engine.benchmark.source",
        "lvlm-prune",
        "private:",
    ]
    assert not said.err
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert recover(base, tmp_path / "slow", bar) == 0
    lines = capfd.readouterr().err.splitlines()
    steps = json.loads((tmp_path / "slow" / "recovery.json").read_text())["training"]["steps"]
    assert lines[-1].startswith(f"Training: {steps} of {steps} steps (100%) after ")


def test_training_lowers_the_loss(bases, recover, tmp_path):
    """On six samples, learnt by heart."""
    losses = {}
    for epochs in (1, 16):
        output = tmp_path / str(epochs)
        assert recover(bases / "unstructured-float32", output, f"--trainer.max_epochs={epochs}") == 0
        losses[epochs] = json.loads((output / "recovery.json").read_text())["training"]["train_loss"]
    assert losses[16] < 0.8 * losses[1]


KILLER = """
import os, signal
from lightning.pytorch.callbacks import Callback
class KillProcess(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_and_resumed_training_ends_with_the_same_weights(bases, labelled, run_cli, recover, tmp_path):
    """Killed in the middle of the second epoch, between two validations; with dropout."""
    base = bases / "unstructured-float32"
    options = ["--trainer.max_epochs=3", "--lora.dropout=0.2", "--trainer.val_check_interval=2", "--data.batch_size=1"]
    assert recover(base, tmp_path / "whole", *options) == 0
    (tmp_path / "killer.py").write_text(KILLER)
    arguments = [f"--model.path={base}", "--data.source=TensorSource", f"--data.source.path={labelled}"]
    arguments += ["--data.validation_samples=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    killed = tmp_path / "killed"
    died = run_cli("recover", *arguments, *options, f"--output={killed}", "--trainer.callbacks=killer.KillProcess")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (killed / "config.json").exists()
    assert (killed / "checkpoints" / "last.ckpt").stat().st_size < (base / "config.json").stat().st_size + 2_000_000
    assert recover(base, killed, *options, "--resume=true") == 0
    whole, resumed = CheckpointFolder(tmp_path / "whole"), CheckpointFolder(killed)
    assert all(whole.read_bytes(key) == resumed.read_bytes(key) for key in whole)
    assert recover(base, killed, *options, "--resume=true") == 0  # complete already


def test_full_disk_while_a_training_checkpoint_is_written(bases, recover, tmp_path, capsys, monkeypatch):
    """At the second validation: what the first one left is whole, and training goes on from there."""
    base, output = bases / "2:4-float32", tmp_path / "out"
    options = ["--trainer.max_epochs=2", "--lora.dropout=0.2"]
    assert recover(base, tmp_path / "whole", *options) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(self, trainer, *_):
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    capsys.readouterr()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(FrozenMasks, "on_train_epoch_start", fill_the_disk)
            assert recover(base, output, *options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = "File too large (nothing is lost; resume with --resume true)"
    assert capsys.readouterr().err == f"error: --output {output}: {said}\n"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert recover(base, output, *options, "--resume=true") == 0
    whole, resumed = CheckpointFolder(tmp_path / "whole"), CheckpointFolder(output)
    assert all(whole.read_bytes(key) == resumed.read_bytes(key) for key in whole)


def test_resumed_with_other_options_is_refused(bases, recover, tmp_path, capsys):
    output = tmp_path / "out"
    assert recover(bases / "unstructured-float32", output) == 0
    capsys.readouterr()
    assert recover(bases / "unstructured-float32", output, "--resume=true", "--lora.rank=3") == 2
    assert "--lora.rank 3" in capsys.readouterr().err
    assert recover(bases / "unstructured-float32", output) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(path.name for path in (REPOSITORY / "configs" / "recover").glob("*.yaml")))
def test_every_recipe_runs_and_its_written_configuration_repeats_it(recipe, bases, recover, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert recover(bases / "2:4-float32", first, f"--config={REPOSITORY / 'configs' / 'recover' / recipe}") == 0
    assert main(["recover", f"--config={first / 'config.yaml'}", f"--output={second}"]) == 0
    one, two = CheckpointFolder(first), CheckpointFolder(second)
    assert all(one.read_bytes(key) == two.read_bytes(key) for key in one)


def test_gradient_checkpointing_gives_the_same_weights(bases, recover, tmp_path, monkeypatch):
    base, runs = bases / "2:4-float32", {}
    step, forwards = LVLMModule.training_step, []
    for name, options in {"plain": [], "checkpointed": ["--optimization.gradient_checkpointing=true"]}.items():

        def counting(self, batch, batch_idx, options=options):
            if not forwards:
                self.runner.block(0).self_attn.register_forward_pre_hook(lambda *_: forwards.append(options))
            return step(self, batch, batch_idx)

        forwards.clear()
        monkeypatch.setattr(LVLMModule, "training_step", counting)
        assert recover(base, tmp_path / name, *options, "--lora.dropout=0.1") == 0
        runs[name] = len(forwards)
    assert runs["checkpointed"] > runs["plain"] > 0
    one, two = (CheckpointFolder(tmp_path / name) for name in runs)
    assert all(one.read_bytes(key) == two.read_bytes(key) for key in one)


def test_mixed_precision_keeps_the_zeros(bases, recover, tmp_path):
    base = bases / "unstructured-float32"
    assert recover(base, tmp_path / "out", "--trainer.precision=bf16-mixed") == 0
    before, after = CheckpointFolder(base), CheckpointFolder(tmp_path / "out")
    changed = [key for key in before if before.read_bytes(key) != after.read_bytes(key)]
    assert len(changed) == 12
    assert all(torch.equal(before.read(key) == 0, after.read(key).view(torch.int32) == 0) for key in changed)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--distillation.weight=0.5"]])
def test_two_processes(options, bases, labelled, run_cli, tmp_path):
    base, output = bases / "2:4-float32", tmp_path / "out"
    arguments = [f"--model.path={base}", "--data.source=TensorSource", f"--data.source.path={labelled}"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    arguments += ["--data.validation_samples=2", "--data.batch_size=2", *options]
    done = run_cli("recover", *arguments, f"--output={output}", timeout=400)
    assert done.returncode == 0, done.stderr
    before, after = CheckpointFolder(base), CheckpointFolder(output)
    changed = [key for key in before if before.read_bytes(key) != after.read_bytes(key)]
    assert len(changed) == 12
    assert all(torch.equal(before.read(key) == 0, after.read(key).view(torch.int32) == 0) for key in changed)
    assert json.loads((output / "recovery.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--distillation.weight=0.5"]])
def test_two_processes_train_as_one(options, bases, labelled, run_cli, recover, tmp_path):
    """The same six samples in each step, with unequally many answer tokens on the two processes."""
    base = bases / "unstructured-float32"
    common = ["--trainer.max_epochs=3", "--optimization.learning_rate=0.01", "--data.validation_samples=2", *options]
    assert recover(base, tmp_path / "one", "--data.batch_size=6", *common) == 0
    arguments = [f"--model.path={base}", "--data.source=TensorSource", f"--data.source.path={labelled}"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = run_cli("recover", *arguments, "--data.batch_size=3", *common, f"--output={tmp_path / 'two'}", timeout=400)
    assert done.returncode == 0, done.stderr
    one, two, before = CheckpointFolder(tmp_path / "one"), CheckpointFolder(tmp_path / "two"), CheckpointFolder(base)
    assert any((one.read(key) - before.read(key)).abs().max() > 1e-3 for key in one)
    for key in one:
        # Adam divides by the size of a gradient: where that is next to nothing, the order of a sum decides its sign.
        apart, moved = two.read(key) - one.read(key), one.read(key) - before.read(key)
        assert apart.norm() <= 2e-3 * moved.norm(), key


def test_accumulated_batches_train_as_one(bases, recover, tmp_path):
    """Six samples with unequally many answer tokens; at the end of an epoch fewer batches than are accumulated."""
    base = bases / "unstructured-float32"
    common = ["--trainer.max_epochs=3", "--optimization.learning_rate=0.01", "--data.validation_samples=2"]
    assert recover(base, tmp_path / "one", "--data.batch_size=6", *common) == 0
    common += ["--data.batch_size=2", "--trainer.accumulate_grad_batches=4"]
    assert recover(base, tmp_path / "many", *common) == 0
    one, many, before = CheckpointFolder(tmp_path / "one"), CheckpointFolder(tmp_path / "many"), CheckpointFolder(base)
    assert any((one.read(key) - before.read(key)).abs().max() > 1e-3 for key in one)
    for key in one:
        torch.testing.assert_close(many.read(key), one.read(key), rtol=0, atol=1e-4)


def test_users_of_lightning_find_what_they_know(bases, recover, tmp_path):
    """Logger, accumulation, early stopping and a checkpoint callback of one's own."""
    options = [
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path / 'logs'}",
        "--trainer.accumulate_grad_batches=3",
        "--trainer.max_epochs=50",
        "--trainer.callbacks=EarlyStopping",
        "--trainer.callbacks.monitor=validation_loss",
        "--trainer.callbacks.patience=1",
        "--trainer.callbacks.min_delta=10",
        "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path / 'own'}",
        "--lora.gradient=straight_through",
        "--lora.targets=*.mlp.*",
    ]
    assert recover(bases / "unstructured-float32", tmp_path / "out", *options) == 0
    record = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert record["training"]["epochs"] == 2
    assert record["training"]["steps"] == 2
    assert list((tmp_path / "own").glob("*.ckpt"))
    metrics = next((tmp_path / "logs").rglob("metrics.csv")).read_text()
    assert "validation_loss" in metrics
    assert "train_loss" in metrics  # though an epoch is shorter than the trainer's interval
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not any("self_attn" in target for target in config["target_modules"])


def test_a_violated_mask_stops_the_run_and_names_the_linear(bases, recover, tmp_path, capsys, monkeypatch):
    """As a mistaken callback, optimizer or kernel would violate it."""
    start = FrozenMasks.on_train_start

    def revive(self, trainer, pl_module):
        start(self, trainer, pl_module)
        weight = next(linear.weight for name, linear in pl_module.pruned.items() if name.endswith("1.mlp.up_proj"))
        weight.data[weight == 0] = -0.0

    monkeypatch.setattr(FrozenMasks, "on_train_start", revive)
    assert recover(bases / "2:4-float32", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "layers.1.mlp.up_proj" in error[0]
    assert not (tmp_path / "out" / "config.json").exists()
