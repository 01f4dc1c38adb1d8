"""The page of a recovery shows its record, and what was trained."""

import json
import time

import pytest

from lvlm_prune.clock import command_began
from lvlm_prune.report import recovery
from lvlm_prune.report.recovery import summarise
from tests.documented import undocumented
from tests.pages import Page, refuse_other_numbers


@pytest.mark.parametrize(("method", "figures"), [("lora", ["losses"]), ("full", ["losses"])])
def test_every_number_is_the_records(method, figures, bases, recover, tmp_path, monkeypatch, capsys):
    output, drawn = tmp_path / "out", []
    draw_all = recovery.draw_all
    monkeypatch.setattr(
        recovery,
        "draw_all",
        lambda page_figures: (draw_all(page_figures), drawn.append(time.perf_counter() - command_began())),
    )
    options = [f"--method={method}", "--trainer.max_epochs=3", "--report=true"]
    assert recover(bases / "unstructured-float32", output, *options) == 0
    record = json.loads((output / "recovery.json").read_text())
    assert not undocumented(output / "recovery.json")
    page = Page((output / "report.html").read_text())
    refuse_other_numbers(page, record | {"summary": json.loads(json.dumps(summarise(record)))})
    assert record["seconds"] >= drawn[0], "its user waits for the figures too"
    said = capsys.readouterr().out
    assert f"recovery.json) · {record['seconds']:.0f} s" in said
    shown = {path: text for path, _, _, text in page.numbers}
    losses = [f"{name.replace('_', ' ')} {shown[f'training/{name}']}" for name in ("train_loss", "validation_loss")]
    assert " · ".join(losses) in said
    assert page.figures == figures
    assert {path.stem for path in (output / "report").glob("*.png")} == set(figures)
    history = record["training"]["history"]
    assert [step for step, _ in history["train_loss"]] == list(range(1, record["training"]["steps"] + 1))
    assert history["train_loss"][-1][1] == pytest.approx(record["training"]["train_loss"])
    assert len(history["validation_loss"]) == 3
    for kind, blocks in summarise(record)["sparsity"].items():
        for block, value in blocks.items():
            (entry,) = [
                e
                for name, e in record["linears"].items()
                if name.endswith(f".{block}.self_attn.{kind}") or name.endswith(f".{block}.mlp.{kind}")
            ]
            assert value == entry["achieved"]
