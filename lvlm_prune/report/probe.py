"""The page about a modality probe, made from its record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from lvlm_prune.output.markdown import markdown_table
from lvlm_prune.report.figures.blocks import curves, heat_map
from lvlm_prune.report.figures.probe import contribution_curves, token_map
from lvlm_prune.report.page import PageFigure, Table, draw_all, model_name, render_page, repeat_command, show
from lvlm_prune.report.sparsity import table_by_kind

_TERMS = {"text": "within text tokens", "visual": "within visual tokens", "between": "between the modalities"}


def probe_page(record: Mapping[str, Any], drawn: Callable[[], None] | None = None) -> tuple[str, dict[str, PageFigure]]:
    """The page as HTML, and the figures on it; every number on it stands in the record, or in its `summary`.

    Args:
        record: What the run found.
        drawn: Called when the figures are drawn, which takes longest; what it notes in the record is on the page.
    """
    run = dict(record) | {"summary": summarise(record)}
    page_figures = {
        page_figure.name: page_figure
        for page_figure in [*_overlaps(run), _map(run), _drift(run), *_diversity(run), _curves(run)]
        if page_figure is not None
    }
    if drawn is not None:
        draw_all(page_figures)
        drawn()
        run |= record
    facts = {
        "model": model_name(run),
        "Linears": show(run, "summary", "num_linears", unit="count"),
        "calibration samples": show(run, "calibration", "num_samples", unit="count"),
        "time": show(run, "seconds", unit="seconds"),
    }
    for modality in run["calibration"]["tokens"]:
        facts[f"{modality} tokens"] = show(run, "calibration", "tokens", modality, unit="count")
    if "dense" in run:
        facts["dense accuracy"] = show(run, "dense", "average", unit="percent")
    title = f"{model_name(run)}: modality probe"
    repeat = repeat_command("probe", run)
    text = render_page(
        "probe.html.j2",
        title,
        run=run,
        page_figures=page_figures,
        facts=facts,
        grids=_grids(run),
        repeat=repeat,
        show=show,
    )
    return text, page_figures


def summarise(record: Mapping[str, Any]) -> dict[str, Any]:
    """Means of a record's numbers that the page shows.

    Returns:
        `iou`: sparsity -> kind of Linear -> block -> mean overlap; `mean_iou`: sparsity -> mean over Linears;
        `diversity`: term -> kind of Linear -> block -> mean; `sparsities`; `num_linears`.
    """
    overlaps: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name, entry in record["linears"].items():
        for sparsity, value in entry["iou"].items():
            overlaps[sparsity][name.rpartition(".")[2]][entry["block"]].append(value)
    diversity: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for block in record["blocks"]:
        for name, terms in block["diversity"].items():
            for term in _TERMS.keys() & terms.keys():
                diversity[term][name.rpartition(".")[2]][block["index"]].append(terms[term])
    return {
        "iou": _means(overlaps),
        "mean_iou": {
            sparsity: _mean([entry["iou"][sparsity] for entry in record["linears"].values()]) for sparsity in overlaps
        },
        "diversity": {term: _means(diversity)[term] for term in _TERMS if term in diversity},
        "sparsities": {sparsity: float(sparsity) for sparsity in overlaps},
        "num_linears": len(record["linears"]),
    }


def grid_markdown(record: Mapping[str, Any]) -> str:
    """Retained accuracy of every cell as a Markdown table; empty where the model was not scored.

    Example:
        >>> cell = {"pathway": "text", "pool": "mixed", "sparsity": 0.5, "retention": {"average": 0.875}}
        >>> print(grid_markdown({"grid": [cell]}))
        | pathway pruned | sparsity | pool mixed |
        |---|---|---|
        | text | 50% | 87.5 |
    """
    cells = [cell for cell in record["grid"] if "retention" in cell]
    if not cells:
        return ""
    pools = list(dict.fromkeys(cell["pool"] for cell in cells))
    found = {(cell["pathway"], cell["sparsity"], cell["pool"]): 100 * cell["retention"]["average"] for cell in cells}
    heads = ["pathway pruned", "sparsity", *(f"pool {pool}" for pool in pools)]
    rows = [
        [pathway, f"{100 * sparsity:g}%", *(f"{found[pathway, sparsity, pool]:.1f}" for pool in pools)]
        for pathway, sparsity in dict.fromkeys((cell["pathway"], cell["sparsity"]) for cell in cells)
    ]
    return markdown_table(heads, rows)


def _grids(run: Mapping[str, Any]) -> dict[str, Table]:
    """Sparsity -> table of retained accuracy, pathways down and pools across."""
    places = {
        (cell["sparsity"], cell["pathway"], cell["pool"]): place
        for place, cell in enumerate(run["grid"])
        if "retention" in cell
    }
    tables: dict[str, Table] = {}
    for sparsity in dict.fromkeys(key[0] for key in places):
        pools = list(dict.fromkeys(key[2] for key in places if key[0] == sparsity))
        rows = [
            [f"{pathway} tokens"]
            + [
                show(run, "grid", places[sparsity, pathway, pool], "retention", "average", unit="percent")
                for pool in pools
            ]
            for pathway in dict.fromkeys(key[1] for key in places if key[0] == sparsity)
        ]
        place = next(number for key, number in places.items() if key[0] == sparsity)
        tables[show(run, "grid", place, "sparsity", unit="sparsity")] = Table(
            ["pruned for", *(f"masks from {pool} tokens" for pool in pools)], rows
        )
    return tables


def _overlaps(run: dict[str, Any]) -> list[PageFigure]:
    page_figures, span = [], _span(run["summary"]["iou"])
    for sparsity, values in run["summary"]["iou"].items():
        caption = Markup(
            "Overlap (intersection over union) of the weights that go at {} by text tokens alone and by visual tokens "
            "alone, in the dense model: one where both give up the same weights."
        ).format(show(run, "summary", "sparsities", sparsity, unit="sparsity"))
        table = table_by_kind(run, "summary", "iou", sparsity)
        page_figures.append(
            PageFigure(
                f"mask-overlap-{100 * float(sparsity):g}",
                heat_map(values, "overlap of masks (IoU)", least_span=0.1, span=span, most=1),
                caption,
                table,
            )
        )
    return page_figures


def _span(maps: Mapping[str, Mapping[str, Mapping[int, float]]]) -> tuple[float, float] | None:
    """The ends of one colour scale for several maps."""
    values = [value for of in maps.values() for row in of.values() for value in row.values()]
    return (min(values), max(values)) if values else None


def _map(run: dict[str, Any]) -> PageFigure | None:
    if not run["map"]:
        return None
    caption = (
        "Inputs of three blocks, brought to two dimensions by t-SNE: one point per token, taken evenly from all "
        "samples. Distances between far groups mean nothing."
    )
    return PageFigure("token-map", token_map(run["map"]), caption)


def _drift(run: dict[str, Any]) -> PageFigure:
    names = list(dict.fromkeys(name for block in run["blocks"] for name in block["drift"]))
    lines = {name: {b["index"]: b["drift"][name] for b in run["blocks"] if name in b["drift"]} for name in names}
    rows = [
        [block["index"], *(show(run, "blocks", place, "drift", name, unit="share") for name in block["drift"])]
        for place, block in enumerate(run["blocks"])
    ]
    caption = "Drift: how far each block moves the tokens of a modality, one minus the cosine of its input and output."
    drawing = curves({"mean drift": {f"{name} tokens": values for name, values in lines.items()}})
    return PageFigure("drift", drawing, caption, Table(["block", *(f"{name} tokens" for name in names)], rows))


def _diversity(run: dict[str, Any]) -> list[PageFigure]:
    page_figures, span = [], _span(run["summary"]["diversity"])
    for term, values in run["summary"]["diversity"].items():
        caption = (
            f"Diversity {_TERMS[term]} of what each kind of Linear puts out: mean cosine distance over pairs of "
            "tokens, dense model. These maps have one colour scale."
        )
        drawing = heat_map(values, f"diversity {_TERMS[term]}", least_span=0.1, span=span)
        page_figures.append(
            PageFigure(f"diversity-{term}", drawing, caption, table_by_kind(run, "summary", "diversity", term))
        )
    return page_figures


def _curves(run: dict[str, Any]) -> PageFigure | None:
    sets = run["contributions"]["sets"]
    if not sets:
        return None
    rows = [
        [
            name,
            *(
                show(run, "contributions", "sets", name, key, rank, unit="share")
                for key in ("received", "singular")
                for rank in (10, 50, 90)
            ),
        ]
        for name in sets
    ]
    columns = ["data set"] + [
        f"{key} {rank}" for key in ("attention, top", "singular, top") for rank in ("10%", "50%", "90%")
    ]
    caption = Markup(
        "How much tokens contribute to the attention of block {}, in the order of their rank: a steep curve means "
        "that few tokens carry the sample. Mean over samples of each data set."
    ).format(show(run, "contributions", "block", unit="count"))
    return PageFigure("contributions", contribution_curves(sets), caption, Table(columns, rows))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _means(nested: Mapping[str, Mapping[str, Mapping[int, list[float]]]]) -> dict[str, dict[str, dict[int, float]]]:
    return {
        key: {kind: {block: _mean(values) for block, values in of.items()} for kind, of in kinds.items()}
        for key, kinds in nested.items()
    }
