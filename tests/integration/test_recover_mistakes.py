"""What `recover` refuses, and how it ends when it is interrupted."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lvlm_prune.callbacks import FrozenMasks
from lvlm_prune.cli import main
from lvlm_prune.data import RecoveryDataModule
from lvlm_prune.errors import InputError
from lvlm_prune.module import LVLMModule
from lvlm_prune.recovery import load_sparse_adapter
from tests.conftest import GOLDEN

CALIBRATION = GOLDEN / "calib.safetensors"


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder)


def test_a_base_without_zeros(bases, recover, tmp_path, capsys):
    assert recover(bases / "dense-float32", tmp_path / "out") == 2
    assert "no Linear of its decoder blocks is pruned" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("val_check_interval=1e308", "an epoch has 3 batches"),
        ("val_check_interval=4", "an epoch has 3 batches"),
        ("limit_train_batches=0.01", "leaves no batch of 3"),
        ("overfit_batches=0.01", "leaves no batch of 3"),
        ("limit_val_batches=0.01", "leaves no batch of 1"),
    ],
)
def test_batches_that_there_are_not_are_refused_before_anything_is_written(option, said, bases, refused, tmp_path):
    refused(said, bases / "2:4-float32", tmp_path / "out", f"--trainer.{option}")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ("1e30", "the loss is NaN or infinite, after the last step"),
        ("1e10", " times as large as before after training"),
    ],
)
def test_weights_that_a_single_step_has_burst_are_no_success(rate, said, method, bases, recover, tmp_path, capsys):
    """The loss of a step is that of the weights before it: behind the last one nobody looked."""
    options = ["--trainer.max_steps=1", f"--optimization.learning_rate={rate}", f"--method={method}"]
    output = tmp_path / "out"
    for more in ([], ["--resume=true"]):
        assert recover(bases / "2:4-float32", output, *options, "--data.validation_samples=0", *more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
        assert "lower --optimization.learning_rate" in line
        assert not (output / "config.json").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_recovery_that_changes_no_weight_is_no_success(method, bases, recover, tmp_path, capsys):
    options = ["--trainer.max_steps=1", "--optimization.learning_rate=1e-30", f"--method={method}"]
    output = tmp_path / "out"
    for more in ([], ["--resume=true"]):
        assert recover(bases / "2:4-float32", output, *options, *more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: training changed no weight")
        assert line.endswith("raise --optimization.learning_rate 1e-30")
        assert not (output / "config.json").exists()


def test_a_loss_far_above_that_of_a_guess_is_no_success(bases, recover, tmp_path, capsys, monkeypatch):
    really = LVLMModule.answer_losses

    def worse(self, batch):
        total, divergence, count = really(self, batch)
        return (total if torch.is_grad_enabled() else total + 2 * count), divergence, count

    monkeypatch.setattr(LVLMModule, "answer_losses", worse)
    assert recover(bases / "2:4-float32", tmp_path / "out", "--trainer.max_steps=1", "--data.validation_samples=0") == 2
    assert "more than that of a guess, after the last step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        ("EarlyStopping", "--trainer.callbacks.monitor: is missing (EarlyStopping)"),
        ("EarlyStopping, init_args: {monitor: a, b: 1}", "--trainer.callbacks.b: unknown option (EarlyStopping)"),
        ("Timer, init_args: {duration: abc}", "--trainer.callbacks: `Timer(duration='abc')` is not a valid duration"),
        ("ModelCheckpoint, init_args: {save_top_k: 3}", "No quantity for top_k to track. (ModelCheckpoint)"),
    ],
)
def test_what_is_wrong_with_a_callback_in_a_file(callback, said, bases, tmp_path, refused):
    """jsonargparse says it inside a choice of types, some of it only when the callback is made."""
    (tmp_path / "config.yaml").write_text(
        f"trainer: {{callbacks: [{{class_path: lightning.pytorch.callbacks.{callback}}}]}}"
    )
    refused(said, bases / "2:4-float32", tmp_path / "out", f"--config={tmp_path / 'config.yaml'}")


def test_a_profiler_of_torch_says_nothing(bases, recover, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it leaves its trace
    assert recover(bases / "2:4-float32", tmp_path / "out", "--trainer.profiler=pytorch", "--trainer.max_steps=1") == 0
    assert capfd.readouterr().err == ""


def test_an_adapter_of_another_base(bases, recover, tmp_path):
    assert recover(bases / "2:4-float32", tmp_path / "out") == 0
    with pytest.raises(InputError, match="belongs to another base"):
        load_sparse_adapter(load(bases / "unstructured-float32"), tmp_path / "out" / "adapter")
    with pytest.raises(InputError, match="not an adapter"):
        load_sparse_adapter(load(bases / "2:4-float32"), tmp_path / "out")


def without_a_matrix(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, adapter / "adapter_model.safetensors")


ADAPTERS = {
    "a matrix less": (without_a_matrix, "lacks lora_B of "),
    "no weights": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "no configuration": (lambda adapter: (adapter / "adapter_config.json").unlink(), "has no adapter_config"),
    "a configuration that is none": (lambda adapter: (adapter / "adapter_config.json").write_text("5"), "PEFT cannot"),
    "a marker without an end": (lambda adapter: (adapter / "sparse_adapter.json").write_text("[" * 9999), "cannot be"),
}


@pytest.mark.parametrize(("damage", "said"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_damaged_adapter_is_one_line(damage, said, bases, recover, tmp_path):
    """PEFT leaves Linears as they are whose matrices are missing, and only warns."""
    assert recover(bases / "2:4-float32", tmp_path / "out") == 0
    damage(tmp_path / "out" / "adapter")
    with pytest.raises(InputError, match=said):
        load_sparse_adapter(load(bases / "2:4-float32"), tmp_path / "out" / "adapter")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora.rank=0"], "--lora.rank 0: must be at least 1"),
        (["--lora.dropout=1"], "--lora.dropout 1:"),
        (["--lora.targets=*.nothing"], "--lora.targets *.nothing: matches no pruned Linear"),
        (["--lora.gradient=rough"], "--lora.gradient rough"),
        (["--method=full", "--lora.rank=4"], "--lora.rank 4: does nothing with --method full"),
        (["--optimization.learning_rate=-1"], "--optimization.learning_rate -1: must be positive"),
        (["--optimization.learning_rate=1e38"], "--optimization.learning_rate 1e+38: must be at most 1e+30"),
        (["--optimization.warmup=2"], "--optimization.warmup 2:"),
        (["--data.validation_samples=8"], "--data.validation_samples 8"),
        (["--data.num_samples=9"], "--data.num_samples 9: the source holds only 8"),
        (["--pruning.sparsity=0.5"], "--pruning.sparsity: unknown option"),
        (["--resume=true"], "--output"),
    ],
)
def test_bad_option(options, said, bases, refused, tmp_path):
    refused(said, bases / "2:4-float32", tmp_path / "out", *options)


@pytest.mark.parametrize(
    "options",
    [["--trainer.max_steps=0"], ["--trainer.max_time=00:00:00:00"], ["--method=blockwise", "--trainer.devices=2"]],
)
def test_the_embedded_model_is_not_pruned_first_where_nothing_would_be_trained(options, tmp_path, capsys):
    assert main(["recover", "--model.path=demo", *options, f"--output={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert "--trainer." in printed.err
    assert "is pruned by ATV" not in printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no labels", "sample 3: has no answer tokens"),
        ("all ignored", "sample 3: has no answer tokens"),
        ("other shape", "sample 3: has labels of shape"),
        ("too long", "sample 3: has 40000 tokens, the model's context is"),
    ],
)
def test_bad_data(case, said, bases, refused, labelled, tmp_path):
    samples = load_file(labelled)
    if case == "no labels":
        samples.pop("s3.labels")
    elif case == "all ignored":
        samples["s3.labels"][:] = -100
    elif case == "other shape":
        samples["s3.labels"] = samples["s3.labels"][..., 1:].contiguous()
    else:
        samples = {name: value for name, value in samples.items() if not name.startswith("s3.")}
        samples["s3.input_ids"] = samples["s3.labels"] = torch.full((1, 40000), 7)
        samples = {name: value.clone() for name, value in samples.items()}
    save_file(samples, tmp_path / "bad.safetensors")
    refused(said, bases / "2:4-float32", tmp_path / "out", data=tmp_path / "bad.safetensors")


def test_the_input_is_never_written(bases, recover, tmp_path):
    shutil.copytree(bases / "2:4-float32", tmp_path / "base")
    before = {path: path.read_bytes() for path in (tmp_path / "base").rglob("*") if path.is_file()}
    assert recover(tmp_path / "base", tmp_path / "out") == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "base").rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(number, bases, recover, tmp_path, capsys, monkeypatch):
    """Of itself Lightning ignores SIGTERM until an epoch is over."""
    handlers = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    with monkeypatch.context() as patched:
        patched.setattr(FrozenMasks, "on_train_start", lambda *_: signal.raise_signal(number))
        assert recover(bases / "2:4-float32", tmp_path / "out") == 128 + number
    assert signal.signal(signal.SIGINT, handlers[0]) is signal.default_int_handler  # Lightning leaves it ignored
    assert signal.getsignal(signal.SIGTERM) is handlers[1]
    assert capsys.readouterr().err.strip() == f"interrupted: go on with --resume true --output {tmp_path / 'out'}"
    assert recover(bases / "2:4-float32", tmp_path / "out", "--resume=true") == 0


def test_resumed_with_other_data_is_refused(bases, labelled, recover, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data.safetensors"
    shutil.copy(labelled, data)
    with monkeypatch.context() as patched:
        patched.setattr(FrozenMasks, "on_train_start", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert recover(bases / "2:4-float32", tmp_path / "out", data=data) == 143
    samples = load_file(data)
    samples["s3.pixel_values"][0, 0] += 1
    save_file(samples, data)
    capsys.readouterr()
    assert recover(bases / "2:4-float32", tmp_path / "out", "--resume=true", data=data) == 2
    said = f"TensorSource: gives other samples now than in the unfinished run in {tmp_path / 'out'}"
    assert capsys.readouterr().err == f"error: --data.source {said}\n"
    shutil.copy(labelled, data)
    assert recover(bases / "2:4-float32", tmp_path / "out", "--resume=true", data=data) == 0


def test_two_runs_do_not_write_one_folder(bases, recover, tmp_path, capsys, monkeypatch):
    """A run that is believed dead, or one that came first while this one looked at the data."""
    output, again = tmp_path / "out", []

    def second_run(*_):
        again.append(recover(bases / "2:4-float32", output, "--resume=true"))

    with monkeypatch.context() as patched:
        patched.setattr(FrozenMasks, "on_train_start", second_run)
        assert recover(bases / "2:4-float32", output) == 0
    assert again == [2]
    assert capsys.readouterr().err == f"error: --output {output}: is being written by another run\n"
    examine, content = RecoveryDataModule.examine, (output / "recovery.json").read_bytes()

    def first_run(data):
        shutil.move(tmp_path / "aside", output)
        return examine(data)

    shutil.move(output, tmp_path / "aside")
    monkeypatch.setattr(RecoveryDataModule, "examine", first_run)
    assert recover(bases / "2:4-float32", output) == 2
    assert f"error: --output {output}: exists and is not empty" in capsys.readouterr().err
    assert (output / "recovery.json").read_bytes() == content


def test_stopping_by_a_loss_that_nothing_is_held_back_for_is_one_line(bases, recover, tmp_path, capsys):
    stopping = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=validation_loss"]
    assert recover(bases / "2:4-float32", tmp_path / "out", "--data.validation_samples=0", *stopping) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --trainer.callbacks: watch validation_loss, and no sample is held back")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.max_time=00:00:00:00"], "--trainer.max_time 0: nothing would be trained"),
        (["--trainer.max_time=99999999999:00:00:00"], "--trainer.max_time 99999999999:00:00:00: Python int too large"),
        (["--trainer.barebones=true"], "--trainer.barebones True: measures no loss"),
        (["--trainer.strategy=ddp_spawn"], "--trainer.strategy ddp_spawn: trains in processes that give nothing back"),
        (["--trainer.val_check_interval=0"], "--trainer.val_check_interval 0: must be larger than 0"),
        (["--trainer.callbacks=LearningRateMonitor"], "--trainer.callbacks: Cannot use `LearningRateMonitor`"),
        (["--trainer.callbacks=WeightAveraging"], "--trainer.callbacks: The size of tensor a"),
        (["--trainer.callbacks=LearningRateFinder"], "--trainer.callbacks: When using the learning rate finder"),
    ],
)
def test_what_lightning_cannot_train_with_is_one_line(options, said, bases, recover, tmp_path, capsys):
    assert recover(bases / "unstructured-float32", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {said}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_error_of_a_callback_of_the_users_own_is_raised(bases, recover, tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Broken(Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        raise ValueError('a bug of mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="a bug of mine"):
        recover(bases / "unstructured-float32", tmp_path / "out", "--trainer.callbacks=of_mine.Broken")


def test_options_that_block_wise_reconstruction_does_not_heed(bases, recover, tmp_path, capsys):
    assert recover(bases / "2:4-float32", tmp_path / "out", "--method=blockwise", "--trainer.max_epochs=3") == 2
    said = "error: --trainer.max_epochs 3: does nothing with recover --method blockwise"
    assert capsys.readouterr().err.strip() == said
    assert not (tmp_path / "out").exists()
