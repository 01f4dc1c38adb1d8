"""The page about a comparison of output folders, made from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lvlm_prune.output.markdown import short_digest
from lvlm_prune.output.summaries import DENSE_MODEL, compared_with
from lvlm_prune.report.block_names import kind_of_blocks
from lvlm_prune.report.figures.blocks import curves, heat_map
from lvlm_prune.report.page import PageFigure, Table, render_page, show
from lvlm_prune.report.sparsity import table_by_kind
from lvlm_prune.report.uniform import EQUAL, has_flat_sparsities, is_uniform

# Pairs of folders that get a figure of their own; of more, those with the first folder.
_MOST_PAIRS = 6


def comparison_page(record: Mapping[str, Any]) -> tuple[str, list[PageFigure]]:
    """The page as HTML, and the figures on it; every number on it stands in the record."""
    names = [folder["name"] for folder in record["folders"]]
    pairs = [number for number, pair in enumerate(record["overlap"]) if pair["mean"] is not None]
    if len(pairs) > _MOST_PAIRS:
        pairs = [number for number in pairs if record["overlap"][number]["first"] == 0]
    kinds = [of for number in pairs for of in record["overlap"][number]["kinds"].values()]
    shares = [share for of in kinds for share in of.values()]
    span = (min(shares, default=0.0), max(shares, default=1.0))
    differing = [number for number in pairs if not is_uniform(record["overlap"][number]["kinds"], EQUAL)]
    page_figures = [_overlap(record, names, number, span) for number in differing]
    notes = []
    if has_flat_sparsities(record):
        notes.append("Each folder is about as sparse in each of its blocks as on the whole.")
    else:
        page_figures.insert(0, _sparsity(record, names))
    for pair in (record["overlap"][number] for number in pairs if number not in differing):
        both = f"{names[pair['first']]} and {names[pair['second']]}"
        notes.append(f"The overlap of {both} is about the same in each block and kind of Linear.")
    settings = [[key, *map(short_digest, values)] for key, values in record["settings"].items()]
    text = render_page(
        "comparison.html.j2",
        " · ".join(names),
        warning=record["warning"],
        folders=_folders(record),
        settings=Table(["setting", *names], settings),
        quality=_quality(record, names),
        origin=compared_with(folder["quality"] for folder in record["folders"]),
        scores=_scores(record, names),
        means=_means(record, names),
        notes=notes,
        page_figures=page_figures,
    )
    return text, page_figures


def _folders(record: Mapping[str, Any]) -> Table:
    rows = []
    for number, folder in enumerate(record["folders"]):
        cells = [
            show(record, "folders", number, key, unit=unit) if folder[key] is not None else "–"
            for key, unit in (("sparsity", "sparsity"), ("average", "percent"), ("retention", "percent"))
        ]
        rows.append([folder["name"], folder["command"], *cells])
    return Table(["folder", "command", "sparsity", "average score", "retained"], rows)


def _quality(record: Mapping[str, Any], names: list[str]) -> Table | None:
    """How near each folder is to the model that was pruned, a column each; None where that was measured of none."""
    found = [folder["quality"] for folder in record["folders"]]
    if not any(found):
        return None
    measures = {
        "perplexity": ("perplexity", "measure"),
        "KL per text token": ("kl", "measure"),
        f"most likely token of the {compared_with(found)}": ("agreement", "percent"),
    }
    rows = [
        [title, *(_measure(record, number, *of) if quality else "–" for number, quality in enumerate(found))]
        for title, of in measures.items()
    ]
    told = {"input of pruning": "input", "measured on": "measured_on"}
    if compared_with(found) == DENSE_MODEL:
        del told["input of pruning"]
    for title, key in told.items():
        rows.append([title, *(quality[key] if quality else "–" for quality in found)])
    return Table(["", *names], rows)


def _measure(record: Mapping[str, Any], number: int, key: str, unit: str) -> str:
    if record["folders"][number]["quality"][key] is None:
        return "–" if key == "agreement" else "infinite or NaN"
    return show(record, "folders", number, "quality", key, unit=unit)


def _scores(record: Mapping[str, Any], names: list[str]) -> Table | None:
    found = [folder["tasks"] or {} for folder in record["folders"]]
    tasks = list(dict.fromkeys(task for of in found for task in of))
    rows = []
    for task in tasks:
        cells = [
            show(record, "folders", number, "tasks", task, unit="percent" if of[task] <= 1 else "number")
            if task in of
            else "–"
            for number, of in enumerate(found)
        ]
        rows.append([task, *cells])
    return Table(["task", *names], rows) if rows else None


def _means(record: Mapping[str, Any], names: list[str]) -> Table:
    rows = []
    for number, pair in enumerate(record["overlap"]):
        mean = show(record, "overlap", number, "mean", unit="share") if pair["mean"] is not None else "–"
        linears = show(record, "overlap", number, "linears", unit="count")
        rows.append([f"{names[pair['first']]} and {names[pair['second']]}", mean, linears])
    return Table(["folders", "overlap (IoU)", "Linears"], rows)


def _sparsity(record: Mapping[str, Any], names: list[str]) -> PageFigure:
    lines = {
        name: {int(block): 100 * value for block, value in of["all"].items()}
        for name, of in zip(names, record["sparsity"], strict=True)
    }
    blocks = sorted({block for line in lines.values() for block in line})
    rows = [
        [block]
        + [
            show(record, "sparsity", number, "all", str(block), unit="sparsity") if str(block) in of["all"] else "–"
            for number, of in enumerate(record["sparsity"])
        ]
        for block in blocks
    ]
    kind = kind_of_blocks(record["sparsity"])
    caption = f"Sparsity of each {kind}, over all its Linears that were to be pruned."
    return PageFigure("sparsity", curves({"sparsity (%)": lines}, least_span=10), caption, Table([kind, *names], rows))


def _overlap(record: Mapping[str, Any], names: list[str], number: int, span: tuple[float, float]) -> PageFigure:
    pair = record["overlap"][number]
    values = {kind: {int(block): value for block, value in of.items()} for kind, of in pair["kinds"].items()}
    caption = Markup(
        "Overlap (intersection over union) of the weights that {} and {} kept; 1 where they are the same.{}"
    ).format(
        names[pair["first"]],
        names[pair["second"]],
        " All pairs have one colour scale." if len(record["overlap"]) > 1 else "",
    )
    drawing = heat_map(values, "overlap of kept weights (IoU)", least_span=0.1, span=span, most=1)
    table = table_by_kind(record, "overlap", number, "kinds")
    return PageFigure(f"overlap-{pair['first']}-{pair['second']}", drawing, caption, table)
