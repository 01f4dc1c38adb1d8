"""What `prune` says about quality: the numbers are those of the whole models in plain transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForImageTextToText

from lvlm_prune.cli import main
from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule, TensorSource
from tests.conftest import ALL_SAMPLES, GOLDEN, MODEL
from tests.integration.test_hub_folders import write_captions, write_folder

CALIBRATION = str(GOLDEN / "calib.safetensors")
MEASURED = ["--evaluate=true", "--trainer.accelerator=cpu"]


def measured(folder: Path, numbers: list[int], data: str = CALIBRATION) -> tuple[float, float, float, float]:
    """Perplexity dense and pruned, KL, share of equal most likely tokens: at every text token of golden samples."""
    source, sums, count = TensorSource(data), torch.zeros(4, dtype=torch.float64), 0
    source.setup()
    models = [AutoModelForImageTextToText.from_pretrained(path).eval() for path in (MODEL, folder)]
    special = [models[0].config.image_token_id, models[0].config.video_token_id]
    for number in numbers:
        inputs = {name: value for name, value in source[number].items() if name != "labels"}
        ids = inputs["input_ids"][0]
        at = [place for place in range(len(ids) - 1) if int(ids[place + 1]) not in special]
        with torch.no_grad():
            dense, pruned = (model(**inputs).logits[0, at].double() for model in models)
        following = ids[[place + 1 for place in at]]
        sums[0] += cross_entropy(dense, following, reduction="sum")
        sums[1] += cross_entropy(pruned, following, reduction="sum")
        sums[2] += kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True)
        sums[3] += (pruned.argmax(-1) == dense.argmax(-1)).sum()
        count += len(at)
    before, after, apart, same = (sums / count).tolist()
    return math.exp(before), math.exp(after), apart, same


@pytest.fixture
def small(golden_arguments, tmp_path) -> list[str]:
    return [*golden_arguments, *MEASURED, "--data.num_samples=3", f"--output={tmp_path / 'out'}"]


def test_the_numbers_are_those_of_the_whole_models(small, tmp_path, capsys, blank_figures):
    assert main([*small, "--held_back=2", "--report=true"]) == 0
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())["quality"]
    data = CalibrationDataModule(TensorSource(CALIBRATION), num_samples=3)
    others, held_back = data.held_back(2)
    assert held_back
    assert not set(others.select()) & set(data.select())
    before, after, apart, same = measured(tmp_path / "out", others.select()[:2])  # the rest stands by
    assert found["dense_perplexity"] == pytest.approx(before, rel=1e-4)
    assert found["perplexity"] == pytest.approx(after, rel=1e-4)
    assert found["kl"] == pytest.approx(apart, rel=1e-3)
    assert found["agreement"] == pytest.approx(same, abs=1.5 / found["tokens"])  # a tie may fall either way
    assert found["samples"] == 2
    said = capsys.readouterr().out
    assert "on 2 samples held back from calibration" in said
    assert f"next: lvlm-prune evaluate --model.path {tmp_path / 'out'} --baseline {MODEL}" in said
    assert "`--method best` keeps more" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "perplexity, pruned" in page
    assert "2 samples held back from calibration" in page
    assert f"{found['kl']:.4g} nats per token" in (tmp_path / "out" / "README.md").read_text()


def test_it_can_be_left_out_and_changes_no_weight(small, tmp_path):
    assert main([*small, "--held_back=0"]) == 0
    assert "quality" not in json.loads((tmp_path / "out" / "pruning.json").read_text())
    without = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main([*small[:-1], f"--output={tmp_path / 'with'}"]) == 0
    assert (tmp_path / "with" / "model.safetensors").read_bytes() == without


def test_a_source_without_other_samples_measures_on_those_that_calibrated(golden_arguments, tmp_path, capsys):
    assert main([*golden_arguments, ALL_SAMPLES, *MEASURED, f"--output={tmp_path / 'out'}"]) == 0
    assert not json.loads((tmp_path / "out" / "pruning.json").read_text())["quality"]["held_back"]
    assert "of the calibration set (there are no others)" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_families_with_tied_embeddings_and_streamed_towers(family, tmp_path):
    write_folder(tmp_path / "dense", family)
    data = write_captions(tmp_path / "images")
    source = [
        "--data.source=LlavaJsonSource",
        f"--data.source.path={data}",
        f"--data.source.image_folder={data.parent}",
    ]
    options = ["--data.num_samples=5", "--trainer.accelerator=cpu", "--report=false"]
    assert main(["prune", f"--model.path={tmp_path / 'dense'}", *source, *options, f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())["quality"]
    assert found["held_back"]
    assert found["samples"] == 3
    assert found["kl"] > 0


def test_answers_that_are_not_a_number_are_not_the_same(tmp_path):
    """The largest of NaN is the first: a broken model would agree with itself on every token."""
    write_folder(tmp_path / "dense", "llava")
    for shard in (tmp_path / "dense").glob("*.safetensors"):
        tensors = load_file(shard)
        head = [name for name in tensors if name.endswith("lm_head.weight")]
        if head:
            save_file(tensors | {head[0]: tensors[head[0]] * math.nan}, shard, metadata={"format": "pt"})
    source = ["--data.source=LlavaJsonSource", f"--data.source.path={write_captions(tmp_path / 'images')}"]
    options = ["--data.num_samples=5", "--trainer.accelerator=cpu", "--report=false"]
    assert main(["prune", f"--model.path={tmp_path / 'dense'}", *source, *options, f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())["quality"]
    assert found == {"not_measured": "logits of the dense model are NaN"}


def test_a_method_without_calibration_is_measured_where_samples_are_named(small, tmp_path, capsys):
    magnitude = ["--pruning.scorer=MagnitudeScorer", "--pruning.pool=MixedPool"]
    assert main([*small, *magnitude, "--held_back=5"]) == 0
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert found["calibration"].get("num_samples", 0) == 0
    assert found["quality"]["held_back"]
    assert found["quality"]["perplexity"] > 0
    assert "--pruning.pool MixedPool and --data.num_samples 3 are not used" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MixedPool" not in card
    assert f"{found['quality']['kl']:.4g} nats per token" in card


def test_without_samples_the_lack_of_numbers_is_said(tmp_path, capsys):
    arguments = ["prune", f"--model.path={MODEL}", "--method=magnitude", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, *MEASURED, "--report=false"]) == 0
    assert "perplexity and KL not measured: the method needs no samples, and none were given" in capsys.readouterr().out


def test_what_recovery_gave_back_is_that_of_the_whole_models(bases, labelled, recover, tmp_path, capsys, blank_figures):
    base, out = bases / "unstructured-float32", tmp_path / "out"
    assert (
        recover(
            base, out, "--report=true", "--evaluate=true", "--trainer.max_epochs=2", "--optimization.learning_rate=0.01"
        )
        == 0
    )
    found = json.loads((out / "recovery.json").read_text())["quality"]
    data = RecoveryDataModule(TensorSource(str(labelled)), validation_samples=2, batch_size=2)
    data.setup()
    for prefix, folder in (("pruned_", base), ("", out)):
        before, after, apart, same = measured(folder, data.validation_indices, str(labelled))
        assert found["dense_perplexity"] == pytest.approx(before, rel=1e-4)
        assert found[f"{prefix}perplexity"] == pytest.approx(after, rel=1e-4)
        assert found[f"{prefix}kl"] == pytest.approx(apart, rel=1e-3)
        assert found[f"{prefix}agreement"] == pytest.approx(same, abs=1.5 / found["tokens"])
    assert found["kl"] != found["pruned_kl"]
    said, card = capsys.readouterr().out, (out / "README.md").read_text()
    numbers = f"{found['pruned_kl']:.4g} → {found['kl']:.4g} nats per token"
    assert "on 2 samples that did not train" in said
    assert numbers in said
    assert numbers in card
    assert "perplexity, recovered" in (out / "report.html").read_text()


def test_without_validation_samples_others_of_the_source_are_measured_on(bases, recover, labelled, tmp_path, capsys):
    few = ["--data.num_samples=5", "--data.validation_samples=0", "--trainer.max_steps=1", "--evaluate=true"]
    assert recover(bases / "unstructured-float32", tmp_path / "out", *few) == 0
    data = RecoveryDataModule(TensorSource(str(labelled)), num_samples=5, validation_samples=0)
    data.setup()
    others = sorted(set(range(8)) - set(data.train_indices))
    _, after, apart, _ = measured(tmp_path / "out", others, str(labelled))
    found = json.loads((tmp_path / "out" / "recovery.json").read_text())["quality"]
    assert found["held_back"]
    assert (found["perplexity"], found["kl"]) == (pytest.approx(after, rel=1e-4), pytest.approx(apart, rel=1e-3))
    assert "on 3 samples that did not train" in capsys.readouterr().out


def test_without_validation_samples_or_a_dense_model_it_says_so(bases, recover, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(bases / "unstructured-float32", base)
    steps = ["--data.validation_samples=0", "--trainer.max_steps=1", "--evaluate=true"]
    assert recover(base, tmp_path / "trained", *steps) == 0
    assert "samples that trained (there are no others)" in capsys.readouterr().out
    assert recover(base, tmp_path / "off", *steps, "--evaluate=false") == 0
    assert "perplexity" not in capsys.readouterr().out
    (base / "pruning.json").unlink()
    assert recover(base, tmp_path / "unknown", *steps) == 0
    assert "perplexity and KL not measured: the dense model is not known" in capsys.readouterr().out
