"""The page about a recovery, made from its record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lvlm_prune.output.base_record import was_pruned_before
from lvlm_prune.output.summaries import measured_on
from lvlm_prune.report.evaluation import (
    evaluated_facts,
    evaluated_figure,
    evaluated_notes,
    evaluated_table,
    with_evaluation,
)
from lvlm_prune.report.figures.blocks import curves
from lvlm_prune.report.figures.training import loss_curves
from lvlm_prune.report.page import PageFigure, Table, draw_all, model_name, render_page, repeat_command, show
from lvlm_prune.report.retention import retained_figure
from lvlm_prune.report.sparsity import sparsity_figure, sparsity_span
from lvlm_prune.report.uniform import is_uniform, sparsity_range

_METHODS = {"lora": "LoRA", "full": "full fine-tuning", "blockwise": "block-wise reconstruction"}
_QUALITY = {
    "dense_perplexity": "perplexity, dense",
    "pruned_perplexity": "perplexity, pruned",
    "perplexity": "perplexity, recovered",
    "pruned_kl": "KL per text token, pruned",
    "kl": "KL per text token, recovered",
    "pruned_agreement": "agreement with the dense model, pruned",
    "agreement": "agreement with the dense model, recovered",
}


def recovery_page(
    record: Mapping[str, Any], folder: Path | None = None, drawn: Callable[[], None] | None = None
) -> tuple[str, dict[str, PageFigure]]:
    """The page as HTML, and the figures on it; every number on it stands in the record, or in its `summary`.

    Args:
        record: What the run did.
        folder: The folder that the run wrote, where perhaps is what `evaluate` found of the checkpoint.
        drawn: Called when the figures are drawn, which takes longest; what it notes in the record is on the page.
    """
    run = with_evaluation(dict(record) | {"summary": summarise(record)}, folder)
    figures = (
        _retained(run),
        evaluated_figure(run),
        _losses(run),
        _errors(run),
        sparsity_figure(run, "Sparsity of each kind of Linear in each block, that of the base."),
    )
    page_figures = {page_figure.name: page_figure for page_figure in figures if page_figure is not None}
    if drawn is not None:
        draw_all(page_figures)
        drawn()
        run |= record
    title = f"{model_name(run)}: recovered by {_METHODS.get(run['method'], run['method'])}"
    text = render_page(
        "recovery.html.j2",
        title,
        run=run,
        page_figures=page_figures,
        facts=_facts(run),
        scores=_scores(run),
        evaluated=evaluated_table(run),
        evaluated_notes=evaluated_notes(run),
        linears=_linears(run),
        repeat=repeat_command("recover", run),
        show=show,
        uniform=is_uniform(run["summary"]["sparsity"]),
        span=sparsity_span(run),
    )
    return text, page_figures


def summarise(record: Mapping[str, Any]) -> dict[str, Any]:
    """Means of a record's numbers that the page shows.

    Returns:
        `sparsity`: kind of Linear (last part of its name) -> number of the block -> share of zeros;
        `sparsity_range`: the lowest and the highest share; `num_linears`.
    """
    zeros: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    sizes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for name, entry in record["linears"].items():
        block = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        kind = name.rpartition(".")[2]
        zeros[kind][block] += entry["zeros"]
        sizes[kind][block] += entry["shape"][0] * entry["shape"][1]
    sparsity = {kind: {block: zeros[kind][block] / sizes[kind][block] for block in zeros[kind]} for kind in zeros}
    return {
        "sparsity": sparsity,
        "sparsity_range": sparsity_range(sparsity),
        "num_linears": len(record["linears"]),
    }


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "base": model_name(run),
        "method": _METHODS.get(run["method"], run["method"]),
        "sparsity": show(run, "verified", "sparsity", unit="sparsity"),
        "pattern": run["pattern"],
    }
    if "evaluation" in run:
        for which in ("pruned", "recovered"):
            facts[f"retained, {which}"] = show(run, "evaluation", "retention", which, "average", unit="percent")
    facts |= evaluated_facts(run)
    found = run.get("quality", {})
    for key, name in _QUALITY.items():
        if found.get(key) is not None:
            if was_pruned_before(run):
                name = name.replace("dense model", "input of pruning").replace("dense", "input of pruning")
            facts[name] = show(run, "quality", key, unit="percent" if key.endswith("agreement") else "measure")
    if "held_back" in found:
        facts["measured on"] = measured_on(found, "recovery")
    elif found:
        facts["perplexity"] = "not measured"
    training = run["training"]
    for key in ("trainable_parameters", "steps"):
        if training.get(key) is not None:
            facts[key.replace("_", " ")] = show(run, "training", key, unit="count")
    for key in ("train_loss", "validation_loss", "error_before", "error_after"):
        if training.get(key) is not None:
            facts[key.replace("_", " ")] = show(run, "training", key)
    facts["time"] = show(run, "seconds", unit="seconds")
    return facts


def _scores(run: Mapping[str, Any]) -> Table | None:
    if "evaluation" not in run:
        return None
    found = run["evaluation"]
    names = ("dense", "pruned", "recovered")
    rows = []
    for task in found["dense"]["tasks"]:
        cells = [show(run, "evaluation", which, "tasks", task, unit="percent") for which in names]
        kept = [
            show(run, "evaluation", "retention", which, "tasks", task, unit="percent")
            if task in found["retention"][which]["tasks"]
            else "–"
            for which in names[1:]
        ]
        rows.append([task, *cells, *kept])
    rows.append(
        ["average"]
        + [show(run, "evaluation", which, "average", unit="percent") for which in names]
        + [show(run, "evaluation", "retention", which, "average", unit="percent") for which in names[1:]]
    )
    return Table(["task", *names, "retained, pruned", "retained, recovered"], rows)


def _losses(run: Mapping[str, Any]) -> PageFigure | None:
    history = {name: points for name, points in run["training"].get("history", {}).items() if points}
    if not history:
        return None
    rows = [
        [
            name.replace("_", " "),
            *(
                show(run, "training", "history", name, place, part, unit=unit)
                for place in (0, -1)
                for part, unit in ((0, "count"), (1, "share"))
            ),
        ]
        for name in history
    ]
    table = Table(["loss", "first step", "value", "last step", "value"], rows)
    what = "cross-entropy of the answer tokens"
    if "teacher" in run:
        what += " alone; that of training is mixed with the divergence from the dense model, so the two do not compare"
    return PageFigure(
        "losses",
        loss_curves(history),
        f"Losses of training and, where samples were held back, of validation: {what}.",
        table,
    )


def _errors(run: Mapping[str, Any]) -> PageFigure | None:
    """Of block-wise reconstruction: how far each block is from the dense one."""
    places = {place: block["index"] for place, block in enumerate(run.get("blocks", [])) if "error_after" in block}
    if not places:
        return None
    keys = {"before": "error_before", "after": "error_after"}
    lines = {name: {index: run["blocks"][place][key] for place, index in places.items()} for name, key in keys.items()}
    rows = [[index, *(show(run, "blocks", place, key) for key in keys.values())] for place, index in places.items()]
    caption = "Relative error of a block's outputs against the dense block, before and after its adapters were fitted."
    return PageFigure("errors", curves({"relative error": lines}), caption, Table(["block", *keys], rows))


def _retained(run: Mapping[str, Any]) -> PageFigure | None:
    if "evaluation" not in run:
        return None
    found = run["evaluation"]["retention"]
    return retained_figure("retention", {which: found[which]["tasks"] for which in ("pruned", "recovered")})


def _linears(run: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            *(show(run, "linears", name, "shape", place, unit="count") for place in (0, 1)),
            show(run, "linears", name, "zeros", unit="count"),
            show(run, "linears", name, "achieved", unit="sparsity"),
        ]
        for name in run["linears"]
    ]
    return Table(["Linear", "outputs", "inputs", "zeros", "sparsity"], rows)
