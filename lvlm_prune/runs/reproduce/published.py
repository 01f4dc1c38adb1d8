"""What the papers printed: every number of their tables, as data.

published/atv.yaml            Mostly Text, Smart Visuals (arXiv 2603.16001, CVPR 2026), with its supplement
published/tamp.yaml           Token-Adaptive Layerwise Pruning (ACL Findings 2025)
published/mllm_pruner.yaml    MLLM-Pruner (OpenReview jmQKr47S77)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lvlm_prune.output.reading import load_yaml

PAPERS = {
    "atv": "ATV-Pruning (arXiv 2603.16001)",
    "tamp": "TAMP (ACL Findings 2025)",
    "mllm_pruner": "MLLM-Pruner (OpenReview jmQKr47S77)",
}

_FOLDER = Path(__file__).parent / "published"
_AVERAGES = ("average", "relative")
_DENSE = ("dense", "full model")

# Averages are printed with one or two decimals, of values with one or two: what rounding explains is no oddity.
_ROUNDING = 0.15

Labels = tuple[Any, ...]
Values = Mapping[str, float | None]


@dataclass(frozen=True)
class PublishedRow:
    """One printed row.

    Args:
        values: Column -> what is printed, None where the paper reports nothing.
        average: The printed average over the benchmarks of pruned / dense, in percent.
    """

    values: Values
    average: float | None = None


@dataclass(frozen=True)
class PublishedTable:
    """What a paper printed for one model.

    Args:
        columns: Names of the columns, the average left out.
        rows: Labels of a row, as printed -> the row.
        dense: The dense model's own values.
        text: What the paper says in words, where it prints no numbers.
    """

    columns: Sequence[str] = ()
    rows: Mapping[Labels, PublishedRow] = field(default_factory=dict)
    dense: Values = field(default_factory=dict)
    text: str = ""


def retention_of(values: Values, dense: Values) -> float | None:
    """Mean over the benchmarks of pruned / dense, in percent, as all three papers count it.

    Args:
        values: Benchmark -> score; None counts as not there.
        dense: Benchmark -> the dense model's score; 0 and None count as not there.

    Returns:
        None where no benchmark has both.

    Example:
        >>> retention_of({"GQA": 50.0, "POPE": 88.0}, {"GQA": 100.0, "POPE": 88.0})
        75.0
    """
    shares = [100 * value / whole for name, value in values.items() if value is not None and (whole := dense.get(name))]
    return sum(shares) / len(shares) if shares else None


def oddity(row: PublishedRow, dense: Values) -> float | None:
    """The average that follows from a printed row, where another one is printed; else None.

    Example:
        >>> oddity(PublishedRow({"GQA": 50.0}, average=60.0), {"GQA": 100.0})
        50.0
        >>> oddity(PublishedRow({"GQA": 50.0}, average=50.1), {"GQA": 100.0})
    """
    follows = retention_of(row.values, dense)
    if follows is None or row.average is None or abs(follows - row.average) <= _ROUNDING:
        return None
    return follows


@cache
def _paper(name: str) -> dict[str, Any]:
    return load_yaml((_FOLDER / f"{name}.yaml").read_text())


def published_table(name: str, model: str = "", average: str = "", transposed: str = "") -> PublishedTable:
    """What a paper printed in one table, for one model.

    Args:
        name: Paper and table, `atv/table_2_main`.
        model: Which model, in a table with several.
        average: Column that holds the average over benchmarks, where it is not called so.
        transposed: Label of the row to read, in a table whose columns are the methods and whose values are seconds.

    Raises:
        KeyError: There is no such paper, table or model.

    Example:
        >>> published_table("atv/table_2_main", "Qwen/Qwen2-VL-7B-Instruct").rows["ATV", 0.6].average
        85.65
        >>> published_table("tamp/table_4_ablation", average="VideoLLaMA2").rows["DAS",].average
        94.0
    """
    paper, _, table = name.partition("/")
    content = _paper(paper)[table]
    if "rows" not in content and "blocks" not in content:
        return PublishedTable(text=content["text"])
    names = list(content["columns"])
    if transposed:
        (row,) = [row for row in content["rows"] if row[0] == transposed]
        return PublishedTable(
            ["seconds"], {(of,): PublishedRow({"seconds": row[1:][at]}) for at, of in enumerate(names)}
        )
    found = content
    if "blocks" in content:
        (found,) = [block for block in content["blocks"] if block["model"] == model]
    # In a table of costs `relative` is a ratio of seconds.
    averages = () if "seconds" in names else _AVERAGES
    last = average or next((column for column in names if column in averages), "")
    columns = [] if average else [column for column in names if column != last]
    rows: dict[Labels, PublishedRow] = {}
    for row in found["rows"]:
        labels, numbers = tuple(row[: -len(names)]), dict(zip(names, row[-len(names) :]))
        rows[labels] = PublishedRow({column: numbers[column] for column in columns}, numbers.get(last))
    dense: Values = dict(zip(names, content["dense"])) if "dense" in content else {}
    dense = dict(zip(names, found["dense"])) if "dense" in found else dense
    for labels in [labels for labels in rows if labels[0] in _DENSE]:
        dense = rows.pop(labels).values
    return PublishedTable(columns, rows, {column: dense[column] for column in columns if column in dense})
