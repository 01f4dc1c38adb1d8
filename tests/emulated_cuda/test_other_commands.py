"""Commands beside `prune` find on a GPU what they find on the CPU, without a race."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN_MODEL
from tests.emulated_cuda import runs

pytestmark = [pytest.mark.emulated_gpu, pytest.mark.slow]

PLACES = ("cpu", "cuda")


def on_both(run, tmp_path: Path, *arguments: str) -> list[Path]:
    """Folders that a command wrote on the CPU and on the device."""
    for where in PLACES:
        found = run(*arguments, f"--trainer.accelerator={where}", output=tmp_path / where, keep=True)
        assert found.status == 0, found.screen
        assert not found.races
    return [tmp_path / where for where in PLACES]


def numbers_of(record: Any, place: str = "") -> dict[str, float]:
    """Every number of a record but those of time and memory, by its place."""
    if isinstance(record, dict):
        left_out = ("seconds", "peak_memory_bytes", "memory", "config", "versions", "cost", "digest", "files")
        pairs = [(key, value) for key, value in record.items() if key not in left_out]
    elif isinstance(record, list):
        pairs = list(enumerate(record))
    else:
        is_number = isinstance(record, (int, float)) and not isinstance(record, bool)
        return {place: float(record)} if is_number else {}
    return {name: number for key, value in pairs for name, number in numbers_of(value, f"{place}.{key}").items()}


def assert_same_numbers(folders: list[Path], name: str, tolerance: float = 1e-5) -> None:
    one, other = (numbers_of(json.loads((folder / name).read_text())) for folder in folders)
    assert one.keys() == other.keys()
    assert len(one) > 3
    for place, number in one.items():
        assert other[place] == pytest.approx(number, rel=tolerance, abs=1e-7), place


def test_a_probe_shows_the_same(run, tmp_path):
    options = ["--data.num_samples=3", "--probing.images=1", "--probing.texts=4", "--probing.sparsities=[0.5]"]
    options += ["--probing.pathways=[text]", "--probing.pools=[mixed]"]
    assert_same_numbers(on_both(run, tmp_path, "probe", *options), "probe.json")


def test_a_sweep_makes_the_same_table(run, tmp_path):
    recipes = json.dumps([str(runs.REPOSITORY / "configs" / "prune" / f"{name}.yaml") for name in ("wanda", "alps_kl")])
    options = [*GOLDEN_MODEL, "--data.num_samples=3", "--engine=tests.engines.ShareLeft"]
    folders = on_both(run, tmp_path, "sweep", *options, f"--recipes={recipes}", '--grid={"pruning.sparsity": [0.5]}')
    tables = [(folder / "sweep.md").read_text() for folder in folders]
    scores = [[line["scores"]["tasks"] for line in lines_of(folder / "sweep.jsonl")] for folder in folders]
    assert scores[0] == scores[1]
    assert all("alps_kl" in table for table in tables)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_embedded_benchmark_gives_the_same_answers(run, tmp_path):
    options = ["--model.path=demo", "--engine.benchmark=EmbeddedBenchmark", "--engine.benchmark.num_images=4"]
    options += ["--engine.benchmark.num_text=4", "--engine.dtype=float32"]
    folders = on_both(run, tmp_path, "evaluate", *options)
    assert_same_numbers(folders, "evaluation.json", 1e-4)


@pytest.mark.parametrize("method", ["lora", "full", "blockwise"])
def test_recovery_trains_the_same_weights(method, run, labelled, tmp_path):
    dense = ["--method=magnitude", "--pruning.sparsity=0.5", "--report=false", "--publishable=false"]
    base = tmp_path / "base"
    assert run("prune", *GOLDEN_MODEL, *dense, "--trainer.accelerator=cpu", output=base, keep=True).status == 0
    options = [f"--method={method}", f"--model.path={base}", "--data.source=TensorSource"]
    options += [f"--data.source.path={labelled}", "--data.validation_samples=2", "--data.batch_size=2"]
    options += ["--lora.dropout=0"] if method != "full" else []
    options += ["--trainer.max_epochs=1", "--report=false"] if method != "blockwise" else ["--report=false"]
    folders = on_both(run, tmp_path, "recover", *options)
    before, one, other = (load_file(folder / "model.safetensors") for folder in (base, *folders))
    changed = [key for key in before if not torch.equal(before[key], one[key])]
    assert changed
    for key in before:
        apart, moved = other[key].float() - one[key].float(), one[key].float() - before[key].float()
        assert apart.norm() <= 1e-2 * moved.norm(), key
        assert torch.equal(one[key] == 0, other[key] == 0)
