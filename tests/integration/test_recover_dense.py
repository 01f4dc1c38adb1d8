"""Recovery with the dense model's help: distillation, and block-wise reconstruction."""

import shutil
import signal

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForImageTextToText

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.data import RecoveryDataModule, TensorSource
from lvlm_prune.data.recovery import SAMPLE_NUMBER
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.base_record import record_of
from lvlm_prune.recovery import distillation, load_sparse_adapter
from lvlm_prune.recovery.dense import write_teacher
from lvlm_prune.recovery.distillation import Distillation, Teacher

DISTIL = ["--distillation.weight=0.5", "--distillation.top_k=16"]
BLOCKWISE = ["--method=blockwise", "--data.validation_samples=0"]


def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def record(folder):
    return record_of(folder)


def distance(folder, dense, data):
    """Mean KL(dense || model) over all tokens of the samples."""
    total, models = 0.0, (model(dense), model(folder))
    with torch.no_grad():
        for number in range(8):
            inputs = TensorSource(str(data))[number]
            inputs.pop("labels")
            one, other = (log_softmax(m(**inputs).logits[0], dim=-1) for m in models)
            total += kl_div(other, one, log_target=True, reduction="batchmean").item() / 8
    return total


def assert_same_weights(one, other):
    one, other = CheckpointFolder(one), CheckpointFolder(other)
    assert all(one.read_bytes(key) == other.read_bytes(key) for key in one)


# ---- distillation ---------------------------------------------------------------------------------------------------
def test_what_is_kept_gives_the_divergence_of_the_two_models(bases, labelled, tmp_path):
    """With the whole vocabulary, over batches with padding and several samples, against both models in memory."""
    dense, pruned = LVLMModule(str(bases / "dense-float32")), LVLMModule(str(bases / "2:4-float32"))
    data = RecoveryDataModule(TensorSource(str(labelled)), batch_size=3, validation_samples=2)
    data.setup("fit")
    samples = [*data.train_indices, *data.validation_indices]
    teacher = Teacher(tmp_path / "teacher", Distillation(weight=0.5, temperature=1.5, top_k=10**6), samples, {})
    write_teacher(dense, data, teacher, torch.device("cpu"), lambda count: None)
    assert dense.model is None
    dense = LVLMModule(dense.path)
    for module in (dense, pruned):
        module.load_whole()
    with torch.no_grad():
        for group in (group for batch in data.batches([5, 0, 3, 6]) for group in batch):
            logits, _ = pruned.answer_logits(group)
            p, q = (log_softmax(one.answer_logits(group)[0] / 1.5, dim=-1) for one in (dense, pruned))
            expected = kl_div(q, p, log_target=True, reduction="sum")
            torch.testing.assert_close(teacher.divergence(logits, group[SAMPLE_NUMBER].tolist()), expected)


def test_distillation_brings_the_model_nearer_to_the_dense_one(bases, recover, labelled, tmp_path):
    base = bases / "unstructured-float32"
    options = ["--distillation.weight=1", "--optimization.learning_rate=0.003", "--trainer.max_epochs=4"]
    assert recover(base, tmp_path / "out", *options) == 0
    dense = bases / "dense-float32"
    assert distance(tmp_path / "out", dense, labelled) < 0.9 * distance(base, dense, labelled)
    assert record_of(tmp_path / "out")["dense"]["folder"] == str(dense)
    assert not (tmp_path / "out" / "teacher").exists()


def test_interrupted_while_the_dense_model_is_asked(bases, recover, tmp_path, capsys, monkeypatch):
    """Goes on behind the last part, without asking for it again, and ends with the same weights."""
    monkeypatch.setattr(distillation, "SAMPLES_PER_PART", 3)
    assert recover(bases / "2:4-float32", tmp_path / "whole", *DISTIL) == 0
    answer_logits, asked = LVLMModule.answer_logits, []

    def interrupted(self, group):
        asked.extend(group[SAMPLE_NUMBER].tolist())
        if len(asked) > 4:
            raise KeyboardInterrupt
        return answer_logits(self, group)

    with monkeypatch.context() as patched:
        patched.setattr(LVLMModule, "answer_logits", interrupted)
        assert recover(bases / "2:4-float32", tmp_path / "out", *DISTIL) == 130
    assert f"go on with --resume true --output {tmp_path / 'out'}" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "teacher").glob("*.safetensors"))) == 1
    assert recover(bases / "2:4-float32", tmp_path / "out", *DISTIL, "--resume=true") == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


# ---- block-wise reconstruction --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_blocks_come_nearer_to_dense_ones_and_zeros_stay(pattern, dtype, bases, recover, labelled, tmp_path):
    base, dense, output = bases / f"{pattern}-{dtype}", bases / f"dense-{dtype}", tmp_path / "out"
    options = ["--reconstruction.epochs=6", "--optimization.learning_rate=0.003"]
    assert recover(base, output, *BLOCKWISE, *options) == 0
    before, after = CheckpointFolder(base), CheckpointFolder(output)
    assert before.tensors == after.tensors
    assert before.shards == after.shards
    for block in record(output)["blocks"]:
        assert block["error_after"] < block["error_before"]
    changed = [key for key in before if before.read_bytes(key) != after.read_bytes(key)]
    assert len(changed) == 12
    for key in changed:
        one, other = before.read(key), after.read(key)
        bits = other.view({4: torch.int32, 2: torch.int16}[other.element_size()])
        assert torch.equal(one == 0, bits == 0), key
    if dtype == "float32":
        assert distance(output, dense, labelled) < 0.9 * distance(base, dense, labelled)
        inputs = TensorSource(str(labelled))[0]
        inputs.pop("labels")
        tuned = load_sparse_adapter(model(base), output / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(tuned(**inputs).logits, model(output)(**inputs).logits, rtol=0, atol=1e-6)
    assert not (output / "blocks").exists()


def test_one_block_is_in_memory_at_a_time(bases, recover, tmp_path, monkeypatch):
    load, most = StreamedWeights.load_block, []

    def counted(self, i, folder=None):
        load(self, i, folder)
        layers = LVLMModule._opened.runner.decoder.layers
        most.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in layers))

    opened = LVLMModule.open

    def remember(self):
        opened(self)
        if "2:4" in self.path:
            LVLMModule._opened = self

    monkeypatch.setattr(LVLMModule, "_opened", None, raising=False)
    monkeypatch.setattr(LVLMModule, "open", remember)
    monkeypatch.setattr(StreamedWeights, "load_block", counted)
    assert recover(bases / "2:4-float32", tmp_path / "out", *BLOCKWISE, "--reconstruction.epochs=1") == 0
    assert most
    assert max(most) == 1


def test_a_block_is_fitted_to_what_the_option_says(bases, recover, tmp_path):
    """The first block is given the same either way; the next ones are not."""
    for inputs in ("dense", "pruned"):
        options = [f"--reconstruction.inputs={inputs}", "--reconstruction.epochs=1"]
        assert recover(bases / "2:4-float32", tmp_path / inputs, *BLOCKWISE, *options) == 0
    blocks = [record(tmp_path / inputs)["blocks"] for inputs in ("dense", "pruned")]
    assert blocks[0][0]["error_after"] == blocks[1][0]["error_after"]
    assert all(one["error_before"] > other["error_before"] for one, other in zip(blocks[0][1:], blocks[1][1:]))


def test_a_block_that_did_not_come_nearer_stays_as_it_was(bases, recover, tmp_path, capsys):
    base = bases / "2:4-float32"
    assert recover(base, tmp_path / "out", *BLOCKWISE, "--optimization.learning_rate=2") == 0
    assert "with --optimization.learning_rate 2 no block came nearer to the dense model" in capsys.readouterr().out
    assert_same_weights(base, tmp_path / "out")


KILLER = """
import os, signal
from lvlm_prune.callbacks import PruneCallback
class KillProcess(PruneCallback):
    def on_block_end(self, trainer, pl_module, block):
        if block.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("inputs", ["dense", pytest.param("pruned", marks=pytest.mark.slow)])
def test_killed_and_resumed_reconstruction_is_byte_identical(inputs, bases, labelled, run_cli, recover, tmp_path):
    base = bases / "unstructured-float32"
    options = ["--method=blockwise", f"--reconstruction.inputs={inputs}", "--lora.dropout=0.1"]
    assert recover(base, tmp_path / "whole", *options) == 0
    (tmp_path / "killer.py").write_text(KILLER)
    arguments = [f"--model.path={base}", "--data.source=TensorSource", f"--data.source.path={labelled}"]
    arguments += ["--data.validation_samples=2", "--data.batch_size=2", "--trainer.accelerator=cpu"]
    killed = tmp_path / "killed"
    died = run_cli("recover", *arguments, *options, f"--output={killed}", "--trainer.callbacks=killer.KillProcess")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (killed / "config.json").exists()
    assert len(record(killed)["blocks"]) == 1
    assert recover(base, killed, *options, "--resume=true") == 0
    assert_same_weights(tmp_path / "whole", killed)
    one, other = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "whole", killed))
    assert one.read_bytes() == other.read_bytes()


# ---- mistakes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--distillation.weight=2"], "--distillation.weight 2: must lie in [0, 1]"),
        (["--distillation.weight=0.5", "--distillation.temperature=0"], "--distillation.temperature 0:"),
        (["--distillation.weight=0.5", "--distillation.top_k=0"], "--distillation.top_k 0"),
        (["--distillation.temperature=3"], "--distillation.temperature 3: does nothing without a weight"),
        (["--dense=nowhere"], "--dense nowhere: does nothing without"),
        ([*DISTIL, "--dense=nowhere"], "--dense nowhere: no such folder"),
        (["--method=blockwise", "--dense=nowhere"], "--dense nowhere: no such folder"),
        (["--method=blockwise", *DISTIL], "--distillation.weight 0.5: does nothing with --method blockwise"),
        (["--method=blockwise", "--reconstruction.epochs=0"], "--reconstruction.epochs 0: must be at least 1"),
        (["--method=blockwise", "--trainer.devices=2"], "--trainer.devices 2: method blockwise runs on one device"),
        (["--reconstruction.epochs=3"], "--reconstruction.epochs 3: does nothing with --method lora"),
    ],
)
def test_bad_option(options, said, bases, refused, tmp_path):
    refused(said, bases / "2:4-float32", tmp_path / "out", *options)


@pytest.mark.parametrize("options", [DISTIL, ["--method=blockwise"]])
def test_nobody_says_what_it_was_pruned_from(options, bases, recover, tmp_path, capsys):
    shutil.copytree(bases / "2:4-float32", tmp_path / "base")
    (tmp_path / "base" / "pruning.json").unlink()
    assert recover(tmp_path / "base", tmp_path / "out", *options) == 2
    assert "--dense '': nothing in" in capsys.readouterr().err
    assert recover(tmp_path / "base", tmp_path / "out", *options, f"--dense={bases / 'dense-float32'}") == 0


@pytest.mark.parametrize("options", [DISTIL, ["--method=blockwise"]])
def test_a_dense_model_with_other_tokens(options, bases, recover, tmp_path, capsys):
    assert recover(bases / "2:4-float32", tmp_path / "out", *options, "--dense=demo") == 2
    assert "--dense demo: has a vocabulary of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recovered_model_still_knows_what_it_was_pruned_from(bases, recover, tmp_path):
    assert recover(bases / "2:4-float32", tmp_path / "once") == 0
    assert recover(tmp_path / "once", tmp_path / "twice", *DISTIL) == 0
    assert record_of(tmp_path / "twice")["dense"]["folder"] == str(bases / "dense-float32")


def test_the_command_is_repeated_by_what_it_wrote(bases, recover, tmp_path):
    assert recover(bases / "2:4-float32", tmp_path / "one", *BLOCKWISE, "--reconstruction.epochs=1") == 0
    assert main(["recover", f"--config={tmp_path / 'one' / 'config.yaml'}", f"--output={tmp_path / 'two'}"]) == 0
    assert_same_weights(tmp_path / "one", tmp_path / "two")
