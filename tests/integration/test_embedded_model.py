"""The first thing a new user does: prune the embedded model, see what it cost, use what was written."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from lvlm_prune import prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.data import CalibrationDataModule, EmbeddedSource
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.evaluation.answers import score
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark
from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.methods.pools import MixedPool, TextOnlyPool, VisualOnlyPool


@pytest.fixture(scope="module")
def questions():
    return EmbeddedBenchmark(num_images=8, num_text=16).questions


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


def test_a_run_shows_retention_and_leaves_a_model_that_answers(
    tmp_path, monkeypatch, capsys, questions, processor, blank_figures
):
    small = functools.partial(BuiltinEngine, EmbeddedBenchmark(num_images=8, num_text=16))
    monkeypatch.setattr("lvlm_prune.callbacks.evaluation.BuiltinEngine", small)
    output = tmp_path / "pruned"
    options = ["--pruning.sparsity=0.5", "--data.num_samples=12", "--model.dtype=float32"]
    assert main(["prune", *options, f"--output={output}"]) == 0
    shown = capsys.readouterr().out
    assert "dense   pruned   retained" in shown
    manifest = json.loads((output / "pruning.json").read_text())
    model = LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32)
    scores = score(model, AutoProcessor.from_pretrained(output), questions)
    assert scores.to_dict() == manifest["evaluation"]["pruned"]
    dense = Scores.from_dict(manifest["evaluation"]["dense"])
    kept = retention(scores, dense)
    assert dense.average > 0.95
    assert kept.average == pytest.approx(manifest["evaluation"]["retention"]["average"])
    assert f"{100 * kept.average:.1f}%" in shown
    assert 0.5 < kept.average < 1
    assert "What it cost" in (output / "report.html").read_text()


def test_which_tokens_calibrate_decides_what_is_retained(questions, processor):
    """Text-only calibration retains more than mixed, mixed more than visual-only; more sparsity retains less."""
    averages = {}
    for pool, sparsity in [(TextOnlyPool, 0.6), (MixedPool, 0.6), (VisualOnlyPool, 0.6), (TextOnlyPool, 0.7)]:
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
        data = CalibrationDataModule(EmbeddedSource(), num_samples=8, batch_size=8)
        prune(model, data, BlockwisePruning(sparsity=sparsity, pool=pool()), processor=processor)
        averages[pool.__name__, sparsity] = score(model, processor, questions).average
    assert averages["TextOnlyPool", 0.6] > averages["MixedPool", 0.6] > averages["VisualOnlyPool", 0.6]
    assert averages["TextOnlyPool", 0.6] > averages["TextOnlyPool", 0.7]


def test_with_outlier_channels_it_is_scored_as_itself(tmp_path, monkeypatch, capsys):
    """`demo-outliers` gives the dense model's answers, and other weights are pruned."""
    small = functools.partial(BuiltinEngine, EmbeddedBenchmark(num_images=10, num_text=20))
    monkeypatch.setattr("lvlm_prune.callbacks.evaluation.BuiltinEngine", small)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    records = {}
    for name in ("demo", "demo-outliers"):
        output = tmp_path / name
        arguments = [f"--model.path={name}", "--data.num_samples=8", "--report=false", f"--output={output}"]
        assert main(["prune", "--method=magnitude", "--pruning.sparsity=0.5", *arguments]) == 0
        assert f"{name} · 6 blocks" in capsys.readouterr().out
        records[name] = json.loads((output / "pruning.json").read_text())
    dense = [record["evaluation"]["dense"]["tasks"] for record in records.values()]
    assert dense[0] == dense[1]
    pruned = [record["evaluation"]["pruned"]["tasks"] for record in records.values()]
    assert pruned[0] != pruned[1]
