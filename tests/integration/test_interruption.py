"""Ctrl-C in the middle of one long instruction, at each verb: over within a second, and the advice that is given works.

Where Python looks at the signal in time, and with several processes: see test_processes.
"""

import json
from pathlib import Path

from lvlm_prune.cli import main
from tests.busy import about_a_second, interrupted_while_busy
from tests.conftest import GOLDEN_ARGUMENTS, GOLDEN_MODEL

BUSY = "--trainer.callbacks=tests.busy.BusyCallback"


def interrupt_and_go_on(folder: Path, arguments: list[str], way_on: str, *resume: str) -> None:
    seconds, status, said = interrupted_while_busy(folder, *arguments)
    assert (status, said) == (130, f"interrupted: {way_on}\n")
    assert seconds < about_a_second()
    assert not (folder / "out" / "config.json").exists()
    assert main([*arguments, *resume]) == 0


def resume(output: Path) -> str:
    return f"go on with --resume true --output {output}"


def test_prune(tmp_path):
    output = tmp_path / "out"
    arguments = [*GOLDEN_ARGUMENTS, BUSY, "--trainer.callbacks.block=1", f"--output={output}"]
    interrupt_and_go_on(tmp_path, arguments, resume(output), "--resume=true")
    assert main([*GOLDEN_ARGUMENTS, f"--output={tmp_path / 'whole'}"]) == 0
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_recover(bases, labelled, tmp_path):
    output = tmp_path / "out"
    arguments = ["recover", f"--model.path={bases / '2:4-float32'}", "--data.source=TensorSource"]
    arguments += [f"--data.source.path={labelled}", "--data.validation_samples=2", "--trainer.accelerator=cpu"]
    arguments += ["--data.batch_size=2", "--report=false", f"--output={output}"]
    arguments += [BUSY, "--trainer.callbacks.step=2"]
    interrupt_and_go_on(tmp_path, arguments, resume(output), "--resume=true")
    assert json.loads((output / "recovery.json").read_text())["status"] == "complete"


def test_sweep(tmp_path):
    """In the second run."""
    output = tmp_path / "out"
    arguments = ["sweep", *GOLDEN_MODEL, "--data.num_samples=2", "--engine=tests.engines.ShareLeft"]
    arguments += [f"--output={output}", "--grid={pruning.sparsity: [0.5, 0.6]}", BUSY, "--trainer.callbacks.block=3"]
    interrupt_and_go_on(tmp_path, arguments, "the same command goes on behind the last finished run")
    lines = [json.loads(line) for line in (output / "sweep.jsonl").read_text().splitlines()]
    assert [line["options"] for line in lines[1:]] == [{"pruning.sparsity": 0.5}, {"pruning.sparsity": 0.6}]
    assert not (output / "unfinished").exists()


def test_probe(tmp_path, blank_figures):
    """In the second cell: the survey makes two masks for each of 24 Linears, a cell one."""
    output = tmp_path / "out"
    arguments = [
        "probe",
        "--data.num_samples=2",
        "--probing.images=1",
        "--probing.texts=4",
        "--probing.sparsities=[0.5]",
    ]
    arguments += ["--probing.pathways=[text]", "--probing.pools=[text,mixed]", "--probing.map_tokens=0"]
    arguments += ["--probing.scorer=tests.busy.BusyScorer", f"--probing.scorer.weight={2 * 24 + 24 + 5}"]
    arguments += ["--probing.curve_samples=0", f"--output={output}"]
    interrupt_and_go_on(tmp_path, arguments, resume(output), "--resume=true")
    record = json.loads((output / "probe.json").read_text())
    assert record["status"] == "complete"
    assert len(record["grid"]) == 2
