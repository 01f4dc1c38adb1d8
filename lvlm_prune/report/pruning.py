"""The page about a pruning run, made from its manifest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lvlm_prune.output.base_record import was_pruned_before
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.private import is_left_out
from lvlm_prune.output.summaries import measured_on
from lvlm_prune.pruning.effects import BINS_PER_DECADE
from lvlm_prune.report.block_names import block_names, numbers_in_parts
from lvlm_prune.report.evaluation import (
    evaluated_facts,
    evaluated_figure,
    evaluated_notes,
    evaluated_table,
    with_evaluation,
)
from lvlm_prune.report.figures.blocks import bars, curves, heat_map, score_distribution, shares
from lvlm_prune.report.linears import experts_of, experts_table, linears_table, patterns_of, summarise_experts
from lvlm_prune.report.page import PageFigure, Table, draw_all, model_name, render_page, repeat_command, show
from lvlm_prune.report.retention import retained_figure
from lvlm_prune.report.selected_tokens import picture_figure
from lvlm_prune.report.sparsity import sparsity_figure, sparsity_span, table_by_kind
from lvlm_prune.report.uniform import is_uniform, sparsity_range

_WORST = 10
_PHASES = {
    "read": "reading weights",
    "gather": "gathering statistics",
    "score": "scoring and masking",
    "solve": "updating weights",
    "propagate": "propagating",
}


def pruning_page(
    manifest: Manifest, folder: Path | None = None, drawn: Callable[[], None] | None = None
) -> tuple[str, dict[str, PageFigure]]:
    """The page as HTML, and the figures on it.

    Args:
        manifest: What the run did; every number on the page stands there, or in `summarise` of it.
        folder: The folder that the run wrote, where the picture of one calibration sample is, and perhaps what
            `evaluate` found of the checkpoint.
        drawn: Called when the figures are drawn, which takes longest; what it notes in the manifest is on the page.
    """
    run = with_evaluation(dict(manifest) | {"summary": summarise(manifest)}, folder)
    page_figures = {
        page_figure.name: page_figure for page_figure in _page_figures(run, folder) if page_figure is not None
    }
    if drawn is not None:
        draw_all(page_figures)
        drawn()
        run |= manifest
    title = f"{model_name(manifest)}: {manifest['method']['init_args']['name']}"
    text = render_page(
        "pruning.html.j2",
        title,
        run=run,
        page_figures=page_figures,
        facts=_facts(run),
        scores=_scores(run),
        evaluated=evaluated_table(run),
        evaluated_notes=evaluated_notes(run),
        no_picture=_no_picture(run),
        repeat=repeat_command("prune", run),
        tries=_tries(run),
        worst=linears_table(run, run["summary"]["worst"]),
        linears=linears_table(run, [name for name in run["linears"] if experts_of(name) is None]),
        experts=experts_table(run),
        worst_experts=linears_table(run, run["summary"]["worst_experts"]),
        show=show,
        uniform=is_uniform(run["summary"]["sparsity"]),
        span=sparsity_span(run),
        left_dense=[name for name, entry in run["linears"].items() if "note" in entry],
    )
    return text, page_figures


def _tries(run: Mapping[str, Any]) -> Table:
    """What a search for the sparsity tried, in order; no rows where none was made."""
    heads = ["method", "sparsity", "agrees with the dense model", "KL"]
    rows = []
    for place, one in enumerate((run.get("search") or {}).get("tries", [])):
        path = ("search", "tries", place)
        apart = "" if one["kl"] is None else show(run, *path, "kl")
        shares = (
            show(run, *path, name, unit=unit) for name, unit in (("sparsity", "sparsity"), ("agreement", "percent"))
        )
        rows.append([one["recipe"], *shares, apart])
    return Table(heads, rows)


def _no_picture(run: Mapping[str, Any]) -> str:
    """Why no sample is drawn."""
    if not run["calibration"].get("num_samples"):
        return "the method uses no samples"
    if is_left_out(run):
        return "pictures of samples are left out of this page"
    return "no sample has exactly one image whose tokens lie on a grid that can be told from the model's inputs"


def summarise(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Sums and means of a manifest's numbers that the page shows.

    Returns:
        `sparsity` and `error`: kind of Linear (last part of its name, after `vision` in a vision tower) -> block, by
        its number in tower or decoder -> share of zeros, and mean relative reconstruction error; `sparsity_range`: the
        lowest and the highest share of zeros; `visual_tokens`: block -> mean per sample; `pool`:
        modality -> block -> share of the pool's tokens; `seconds`: phase -> seconds; `worst`, `worst_experts`: names of
        the Linears, and of the experts' matrices, of largest error; `experts`: matrix of all routed experts of a block
        -> means over them; `patterns`: N:M pattern, or `dense` -> number of Linears; `num_linears`, `num_blocks`,
        `num_vision_blocks`, `num_weights`.
    """
    zeros: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    sizes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    in_tower = {block["index"] for block in manifest["blocks"] if block.get("target") == "vision"}
    numbers = numbers_in_parts(manifest)
    for name, entry in manifest["linears"].items():
        kind, size = name.rpartition(".")[2], entry["shape"][0] * entry["shape"][1]
        if entry["block"] in in_tower:
            kind = f"vision {kind}"
        block = numbers.get(entry["block"], entry["block"])
        zeros[kind][block] += entry["achieved"] * size
        sizes[kind][block] += size
        if "error" in entry:
            errors[kind][block].append(entry["error"])
    blocks = manifest["blocks"]
    seconds = {"catching block inputs": manifest["catch_seconds"]}
    if "seconds" in manifest.get("search", {}):
        seconds = {"finding the sparsity": manifest["search"]["seconds"], **seconds}
    if "seconds" in manifest.get("survey", {}):
        seconds["surveying the dense model"] = manifest["survey"]["seconds"]
    for phase, name in _PHASES.items():
        took = sum(block["seconds"].get(phase, 0.0) for block in blocks)
        if took or phase != "solve":  # most scorers update nothing
            seconds[name] = took
    seconds["starting and writing"] = max(
        manifest.get("work_seconds", manifest["seconds"]) - sum(seconds.values()), 0.0
    )
    # Text first, so that a modality has the same colour on all pages; a tower's blocks have images only.
    modalities = sorted(
        {name for block in blocks for name in block.get("pool", {})}, key=lambda name: (name != "text", name)
    )
    ranked = sorted(manifest["linears"].items(), key=lambda item: -item[1].get("error", 0.0))
    sparsity = {kind: {block: zeros[kind][block] / sizes[kind][block] for block in zeros[kind]} for kind in zeros}
    return {
        "sparsity": sparsity,
        "sparsity_range": sparsity_range(sparsity),
        # In the order of `sparsity`, also where the first blocks of a kind stayed dense and have no error.
        "error": {
            kind: {block: sum(v) / len(v) for block, v in errors[kind].items()} for kind in sparsity if kind in errors
        },
        "visual_tokens": {
            block["index"]: sum(block["visual_tokens"]) / len(block["visual_tokens"])
            for block in blocks
            if block.get("visual_tokens")
        },
        "pool": {
            name: {
                block["index"]: block["pool"].get(name, 0.0) / sum(block["pool"].values())
                for block in blocks
                if block.get("pool")
            }
            for name in modalities
        },
        "seconds": seconds,
        "worst": [name for name, entry in ranked if "error" in entry and experts_of(name) is None][:_WORST],
        "worst_experts": [name for name, entry in ranked if "error" in entry and experts_of(name)][:_WORST],
        "experts": summarise_experts(manifest["linears"]),
        "patterns": patterns_of(manifest),
        "num_linears": len(manifest["linears"]),
        "num_blocks": len(blocks),
        "num_vision_blocks": len(in_tower),
        "num_weights": sum(sum(of.values()) for of in sizes.values()),
    }


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": model_name(run),
        "method": run["method"]["init_args"]["name"],
        "sparsity": show(run, "sparsity", "achieved", unit="sparsity"),
        "pattern": run.get("pattern", run["method"]["init_args"]["pattern"]),
    }
    for target in run["sparsity"].get("parts", {}):
        facts[f"sparsity, {target}"] = show(run, "sparsity", "parts", target, "achieved", unit="sparsity")
    if "evaluation" in run:
        facts["retained accuracy"] = show(run, "evaluation", "retention", "average", unit="percent")
    facts |= evaluated_facts(run) | _quality_facts(run)
    if "size_bytes" in run:
        facts["checkpoint, zeros included"] = show(run, "size_bytes", unit="bytes")
    facts["time"] = show(run, "seconds", unit="seconds")
    facts |= _memory_facts(run)
    facts["weights considered"] = show(run, "summary", "num_weights", unit="count")
    if "num_samples" in run["calibration"]:
        facts["calibration samples"] = show(run, "calibration", "num_samples", unit="count")
    return facts


def _memory_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """The peak as the plan counts it, which is without mapped files, and all that was resident; or that of the GPU."""
    measured = run.get("memory", {}).get("measured", {})
    on_gpu = measured.get("device") is not None
    facts: dict[str, Any] = {}
    if measured.get("host") is not None:
        name = "peak memory of the host" if on_gpu else "peak memory"
        facts[f"{name}, without mapped files"] = show(run, "memory", "measured", "host", unit="bytes")
    if "peak_memory_bytes" in run:
        name = "peak memory of the GPU" if on_gpu else "peak memory, with mapped files" if facts else "peak memory"
        facts[name] = show(run, "peak_memory_bytes", unit="bytes")
    return facts


def _quality_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What pruning cost on a few samples; empty where nothing was measured."""
    was_sparse = was_pruned_before(run)
    before, model = ("before", "sparse model") if was_sparse else ("dense", "dense model")
    names = {"dense_perplexity": f"perplexity, {before}", "perplexity": "perplexity, pruned", "kl": "KL per text token"}
    found = run.get("quality", {})
    facts: dict[str, Any] = {"zeros before": show(run, "input_zeros", unit="sparsity")} if was_sparse else {}
    facts |= {
        name: show(run, "quality", key, unit="measure") for key, name in names.items() if found.get(key) is not None
    }
    if "held_back" in found:
        facts["measured on"] = measured_on(found)
    elif found:
        facts["perplexity"] = "not measured"
    if "agreement" in found:
        facts[f"agreement with the {model}"] = show(run, "quality", "agreement", unit="percent")
    return facts


def _scores(run: Mapping[str, Any]) -> Table | None:
    if "evaluation" not in run:
        return None
    rows = [
        [task, *(show(run, "evaluation", which, "tasks", task, unit="percent") for which in ("dense", "pruned")), kept]
        for task in run["evaluation"]["dense"]["tasks"]
        for kept in [
            show(run, "evaluation", "retention", "tasks", task, unit="percent")
            if task in run["evaluation"]["retention"]["tasks"]
            else "–"
        ]
    ]
    rows.append(
        ["average"]
        + [show(run, "evaluation", which, "average", unit="percent") for which in ("dense", "pruned", "retention")]
    )
    return Table(["task", "dense", "pruned", "retained"], rows)


def _page_figures(run: dict[str, Any], folder: Path | None) -> list[PageFigure | None]:
    return [
        _retained(run),
        evaluated_figure(run),
        sparsity_figure(run, "Sparsity of each kind of Linear in each block."),
        _saliency(run),
        _pool(run),
        _score_distribution(run),
        _error(run),
        _seconds(run),
        picture_figure(run, folder),
    ]


def _retained(run: Mapping[str, Any]) -> PageFigure | None:
    if "evaluation" not in run:
        return None
    return retained_figure("retention", {"pruned": run["evaluation"]["retention"]["tasks"]})


def _error(run: dict[str, Any]) -> PageFigure | None:
    if not run["summary"]["error"]:
        return None
    kind = run["reconstruction"]
    how = {
        "exact": "from the Gram matrix of its inputs",
        "diagonal": "estimated from the norms of its input channels, taken for uncorrelated",
    }[kind]
    caption = (
        "Relative reconstruction error of each Linear on the calibration tokens of the pool, "
        f"‖(W − W′) X‖ / ‖W X‖, {how}. Of large Linears evenly spaced rows are taken."
    )
    drawing = heat_map(run["summary"]["error"], "relative reconstruction error", "{:.3f}", least_span=0.1)
    return PageFigure("reconstruction-error", drawing, caption, table_by_kind(run, "summary", "error"))


def _saliency(run: dict[str, Any]) -> PageFigure | None:
    blocks = run["blocks"]
    means = list(dict.fromkeys(key for block in blocks for key in block if key.startswith("mean_")))
    panels: dict[str, dict[str, dict[int, float]]] = {
        key.replace("_", " "): {"": {block["index"]: block[key] for block in blocks if key in block}} for key in means
    }
    tokens = run["summary"]["visual_tokens"]
    if tokens:
        panels["visual tokens\nper sample"] = {"": tokens}
    if not panels:
        return None
    names = block_names(run)
    rows = [
        [names[block["index"]]]
        + [show(run, "blocks", place, key) if key in block else "–" for key in means]
        + ([show(run, "summary", "visual_tokens", block["index"], unit="number")] if tokens else [])
        for place, block in enumerate(blocks)
    ]
    columns = ["block", *(key.replace("_", " ") for key in means), *(["visual tokens per sample"] if tokens else [])]
    caption = (
        "How salient visual tokens are at each block, and how many of them calibrate it: the mean over samples of the "
        "number selected."
    )
    return PageFigure("saliency", curves(panels, names=names), caption, Table(columns, rows))


def _pool(run: dict[str, Any]) -> PageFigure | None:
    parts = run["summary"]["pool"]
    if not parts:
        return None
    names = block_names(run)
    rows = [
        [names[block["index"]]]
        + [
            cell
            for name in parts
            for cell in (
                show(run, "blocks", place, "pool", name, unit="number") if name in block["pool"] else "–",
                show(run, "summary", "pool", name, block["index"], unit="percent"),
            )
        ]
        for place, block in enumerate(run["blocks"])
        if block.get("pool")
    ]
    caption = "Which tokens calibrate each block, by modality; tokens with a weight count as much as their weight."
    columns = ["block", *(column for name in parts for column in (f"{name} tokens", f"{name} share"))]
    return PageFigure("pool", shares(parts, "tokens of the pool", names), caption, Table(columns, rows))


def _score_distribution(run: dict[str, Any]) -> PageFigure | None:
    found = {block["index"]: block["scores"] for block in run["blocks"] if "scores" in block}
    if not found:
        return None
    names = block_names(run)
    rows = [
        [names[block["index"]], *(show(run, "blocks", place, "scores", "threshold", quantile) for quantile in range(3))]
        for place, block in enumerate(run["blocks"])
        if "scores" in block
    ]
    caption = (
        "Scores of the weights of each block before any is changed, and the threshold under which they go: "
        "of each row the largest score that went. Of large Linears evenly spaced rows are shown."
    )
    table = Table(["block", "lowest tenth of thresholds", "median", "highest tenth"], rows)
    return PageFigure("scores", score_distribution(found, BINS_PER_DECADE, names), caption, table)


def _seconds(run: dict[str, Any]) -> PageFigure:
    seconds = run["summary"]["seconds"]
    rows = [[name, show(run, "summary", "seconds", name)] for name in seconds]
    caption = "Where the time went, before verification and evaluation."
    return PageFigure("seconds", bars(seconds, "seconds"), caption, Table(["phase", "seconds"], rows))
