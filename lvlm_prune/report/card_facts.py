"""The table at the top of a model card: what was pruned, how, on what, and what stayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lvlm_prune.methods import solvers
from lvlm_prune.output.base_record import name_of_input
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.summaries import readable_count, size_ratio
from lvlm_prune.output.units import readable_percent
from lvlm_prune.report.card_loading import TEXT_ONLY
from lvlm_prune.report.linears import patterns_of

_RECOVERIES = {
    "lora": "sparse LoRA adapters, merged into the weights",
    "full": "fine-tuning of the weights that are not zero",
    "blockwise": "adapters fitted block by block to the dense model's outputs, merged into the weights",
}


def card_facts(
    record: Mapping[str, Any], how: Mapping[str, Any], packing: Mapping[str, Any], was_sparse: bool
) -> Iterator[tuple[str, str]]:
    """Rows of the card's table.

    Args:
        record: Of the run that made the checkpoint.
        how: What its pruning is known by, see `pruned_how`.
        packing: What `pack` noted; empty where the checkpoint is not packed.
        was_sparse: Whether the model that was pruned had been pruned before, in these or in other weights.

    Yields:
        What it is, and what is said of it.
    """
    linears = record.get("linears", {})
    sizes = [entry["shape"][0] * entry["shape"][1] for entry in linears.values()]
    if sizes:
        of_decoder = "training" in record and "vision" in how.get("sparsity", {}).get("parts", {})
        yield (
            "pruned, of the decoder" if of_decoder else "pruned",
            f"{len(sizes)} Linears, {readable_count(sum(sizes))} weights",
        )
        yield "zeros", _zeros_of(record, how)
    if "pattern" in record:
        yield "pattern", _pattern(record)
    if method := how.get("method"):
        yield "method", _plugins(method, bool(how.get("calibration", {}).get("num_samples")))
        yield "calibration", _calibration(how.get("calibration", {}))
    if search := record.get("search"):
        share = f"{search['keep']:.1%} of the {name_of_input(record)} model's most likely tokens"
        yield "sparsity", f"the highest of {len(search['tries'])} tries that keeps {share}"
    if "training" in record:
        yield "recovery", _RECOVERIES.get(record["method"], str(record["method"])) + _trained(record)
    elif "updates_weights" in how:
        kept = "were updated by the solver" if how["updates_weights"] else "are as they were, byte for byte"
        yield "weights that remain", kept
    if "verified" in record:
        # What a recovery does not train, and what was not pruned now, may have zeros from before.
        label = "not trained" if "training" in record else "stayed as it was" if was_sparse else "stayed dense"
        yield label, _stayed_dense(record, how)
    if packing:
        form, sizes_of = packing["config"]["format"], packing["packed"]
        yield "packed", f"{sizes_of['tensors']} tensors as {form}, {size_ratio(sizes_of)}"


def _pattern(record: Mapping[str, Any]) -> str:
    """The pattern, and how many Linears have which where they do not all have the same.

    Example:
        >>> _pattern({"pattern": "2:4", "linears": {"q": {"target": 0.5}, "k": {"target": 0.0}}})
        '2:4 (Linears with each: 2:4 1, dense 1)'
    """
    counts = patterns_of(record)
    each = ", ".join(f"{name} {count}" for name, count in counts.items())
    return str(record["pattern"]) + (f" (Linears with each: {each})" if len(counts) > 1 else "")


def _zeros_of(record: Mapping[str, Any], how: Mapping[str, Any]) -> str:
    achieved = Manifest(record).achieved_sparsity()
    target = how.get("sparsity", {}).get("target")
    asked = f" (asked: {readable_percent(target)})" if target is not None else ""
    return f"{readable_percent(achieved)} of these weights{asked}, counted in the written files"


def _plugins(method: Mapping[str, Any], is_calibrated: bool) -> str:
    """The method's name and what it is composed of; without samples no pool is asked, and by some solvers no scorer."""
    options = method.get("init_args", {})
    kinds = (
        *(["pool"] if is_calibrated else []),
        *(["scorer"] if _asks_scorer(options) else []),
        "solver",
        "allocation",
    )
    parts = [
        str(options[name]["class_path"]).rpartition(".")[2]
        for name in kinds
        if isinstance(options.get(name), Mapping) and "class_path" in options[name]
    ]
    name = str(options.get("name") or "")
    return f"{name} ({', '.join(parts)})" if name and parts else name or ", ".join(parts)


def _asks_scorer(options: Mapping[str, Any]) -> bool:
    """Whether the solver begins with what the scorer's own solver found; by its record, so that only ours are known."""
    solver = options.get("solver")
    while isinstance(solver, Mapping):
        found = getattr(solvers, str(solver.get("class_path", "")).rpartition(".")[2], None)
        if found is None:
            return True
        if not found.continues:
            return False
        solver = solver.get("init_args", {}).get("start")
    return True


def _calibration(calibration: Mapping[str, Any]) -> str:
    if not calibration.get("num_samples"):
        return "none: the method needs no data"
    source = str(calibration.get("source", {}).get("class_path", "")).rpartition(".")[2]
    known: Mapping[str, float] = calibration.get("tokens", {})
    tokens = ", ".join(f"{count} {name}" for name, count in known.items())
    text = f"{calibration['num_samples']} samples of {source}, seed {calibration.get('seed')} ({tokens} tokens"
    if (counted := calibration.get("counted")) is not None:
        taken = {name: round(counted.get(name, 0)) for name in known}
        if taken != known:
            text += f", of which {', '.join(f'{count} {name}' for name, count in taken.items())} counted per block"
    return f"{text})"


def _trained(record: Mapping[str, Any]) -> str:
    training, data = record["training"], record.get("data", {})
    source = str(data.get("source", {}).get("class_path", "")).rpartition(".")[2]
    on = f" on {data['samples']} samples of {source}" if data.get("samples") and source else ""
    return f" ({readable_count(training['trainable_parameters'])} parameters, {training['steps']} steps{on})"


def _stayed_dense(record: Mapping[str, Any], how: Mapping[str, Any]) -> str:
    text = f"{record['verified']['untouched_tensors']} other tensors, byte for byte: embeddings, output head, norms"
    parts = how.get("sparsity", {}).get("parts", {"language": {}})
    text += "" if "language" in parts or "training" in record else ", language decoder"
    if not str(record.get("model", {}).get("class", "")).endswith(TEXT_ONLY):
        # Recovery trains the decoder only, whatever was pruned.
        is_changed = "vision" in parts and "training" not in record
        text += ", projector" if is_changed else ", projector and vision tower"
    excluded = how.get("method", {}).get("init_args", {}).get("exclude")
    if excluded:
        text += f"; excluded from pruning: {', '.join(map(str, excluded))}"
    if how.get("method", {}).get("init_args", {}).get("experts") == "keep":
        text += "; routed experts, where it has any"
    left = sum("note" in entry for entry in record.get("linears", {}).values())
    return text + (f"; {left} Linears that saw too few calibration tokens, or zeros alone" if left else "")
