"""Tables of Linears on the page of a pruning run; matrices of routed experts are summed up by block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from lvlm_prune.methods.patterns import parse_pattern
from lvlm_prune.report.page import Table, show


def experts_of(name: str) -> str | None:
    """What a matrix of a routed expert is called together with those of the other experts; None for other Linears.

    Example:
        >>> experts_of("model.layers.0.mlp.experts.7.down_proj"), experts_of("model.layers.0.mlp.up_proj")
        ('model.layers.0.mlp.experts.*.down_proj', None)
    """
    together, experts = re.subn(r"\.(\w*experts\w*)\.\d+\.", r".\1.*.", name)
    return together if experts else None


def summarise_experts(linears: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Means over the experts of a block.

    Args:
        linears: Name -> entry of a manifest.

    Returns:
        Name of the matrices together -> `experts`, how many; `shape`; `target`, `achieved`; and where errors were
        measured `error` and `largest_error`.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, entry in linears.items():
        if (together := experts_of(name)) is not None:
            groups[together].append(entry)
    found: dict[str, dict[str, Any]] = {}
    for together, entries in groups.items():
        numbers = {key: sum(entry[key] for entry in entries) / len(entries) for key in ("target", "achieved")}
        found[together] = {"experts": len(entries), "shape": entries[0]["shape"]} | numbers
        errors = [entry["error"] for entry in entries if "error" in entry]
        if errors:
            found[together] |= {"error": sum(errors) / len(errors), "largest_error": max(errors)}
    return found


def patterns_of(record: Mapping[str, Any]) -> dict[str, int]:
    """How many Linears have which N:M pattern; `dense` are those that an allocation left so. Empty without N:M.

    Args:
        record: `pruning.json` or `recovery.json`.

    Example:
        >>> patterns_of({"pattern": "2:4,1:4", "linears": {"q": {"target": 0.75}, "k": {"target": 0.0}}})
        {'1:4': 1, 'dense': 1}
        >>> patterns_of({"pattern": "2:4", "linears": {"q": {"achieved": 0.5001}, "k": {"achieved": 0.0001}}})
        {'2:4': 1, 'dense': 1}
    """
    try:
        pattern = parse_pattern(str(record["pattern"]))
    except ValueError:
        return {}  # of another version
    if not pattern.levels:
        return {}
    found = [entry.get("target", entry.get("achieved", 0.0)) for entry in record.get("linears", {}).values()]
    # A few zeros that were there before make no pattern.
    least = min(pattern.levels) - 1e-9
    names = [str(pattern.at(sparsity)) if sparsity >= least else "dense" for sparsity in found]
    return {name: names.count(name) for name in sorted(set(names), key=lambda name: (name == "dense", name))}


def linears_table(run: Mapping[str, Any], names: Iterable[str]) -> Table:
    """A row for each of some Linears of a record."""
    rows = []
    for name in names:
        entry = run["linears"][name]
        numbers = [show(run, "linears", name, key, unit="sparsity") for key in ("target", "achieved")]
        error = show(run, "linears", name, "error", unit="share") if "error" in entry else "–"
        rows.append([name, error, *numbers, _shape(run, "linears", name)])
    return Table(["Linear", "error", "target", "achieved", "shape"], rows)


def _shape(run: Mapping[str, Any], *path: str) -> Markup:
    """Outputs times inputs of a matrix, `512 × 192`."""
    sizes = (show(run, *path, "shape", place, unit="count") for place in (0, 1))
    return Markup("\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}").join(sizes)


def experts_table(run: Mapping[str, Any]) -> Table:
    """A row for each matrix of the routed experts of a block, means over them."""
    rows = []
    for together, entry in run["summary"]["experts"].items():
        path = ("summary", "experts", together)
        errors = [show(run, *path, key, unit="share") if key in entry else "–" for key in ("error", "largest_error")]
        numbers = [show(run, *path, key, unit="sparsity") for key in ("target", "achieved")]
        count = show(run, *path, "experts", unit="count")
        rows.append([together, count, *errors, *numbers, _shape(run, *path)])
    names = ["experts", "number", "mean error", "largest error", "target", "achieved", "shape"]
    return Table(names, rows)
