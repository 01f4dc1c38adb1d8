"""Tables to reproduce, as the files under `configs/reproduce` declare them.

configs/reproduce/atv/table_2.yaml   title, published values, models, rows: label -> recipe and options
configs/reproduce/benchmarks.yaml    column -> task and metric of lmms-eval
configs/reproduce/models.yaml        model -> parameters, name of its kind in lmms-eval
configs/reproduce/calibration.yaml   name -> options of `data`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lvlm_prune.errors import InputError, meant
from lvlm_prune.output.names import PROBE_RECORD
from lvlm_prune.output.reading import load_yaml
from lvlm_prune.recipes import CONFIGS
from lvlm_prune.runs.reproduce.published import Labels, PublishedTable, Values, published_table

FOLDER = CONFIGS / "reproduce"
# The probe scores weights as Wanda does.
_PROBED = "wanda"


@dataclass(frozen=True)
class Benchmark:
    """What a column of a table is in lmms-eval.

    Args:
        name: As the papers call it.
        task: Of the harness; empty where it has none.
        metric: Of the task; two joined by + are added.
        best: Best possible value of the metric.
        scale: The same as the papers print it.
        questions: Of the test set, about.
        judge: Whether answers are judged by a model behind an API.
    """

    name: str
    task: str = ""
    metric: str = ""
    best: float = 1.0
    scale: float = 100.0
    questions: int = 0
    judge: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A model of the papers.

    Args:
        path: Hub id.
        parameters: How many there are.
        harness: Its kind by the name of lmms-eval.
        missing: Why there is no checkpoint that can be read; empty where there is.
    """

    path: str
    parameters: float
    harness: str
    missing: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        labels: As published.
        recipe: Name of a file in `configs/prune`; in a table of the probe only its calibration set is used.
        options: Dotted names of options under `pruning` -> values that take the place of the recipe's.
        calibration: Name of a calibration set.
    """

    labels: Labels
    recipe: str
    options: Mapping[str, Any]
    calibration: str

    @property
    def label(self) -> str:
        """The labels in one line."""
        return " · ".join(_readable(label) for label in self.labels)


@dataclass(frozen=True)
class Part:
    """The rows of one model.

    Args:
        model: The model.
        benchmarks: What is measured, in the order of the columns.
        rows: What is pruned.
        published: What was printed.
        dense: The dense model's printed values, perhaps of another table.
    """

    model: Checkpoint
    benchmarks: Sequence[Benchmark]
    rows: Sequence[Row]
    published: PublishedTable
    dense: Values

    @property
    def measured(self) -> list[Benchmark]:
        """The benchmarks that the harness has."""
        return [benchmark for benchmark in self.benchmarks if benchmark.task]


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Args:
        name: Paper and table, `atv/table_2`.
        title: In a line.
        parts: One for each model.
        axis: What the rows run along, where they do.
        cost: Whether seconds are part of the table.
        probe: Whether the rows are pathways that the modality probe prunes.
        labels: What the labels of a row are; `row` where they say it themselves.
    """

    name: str
    title: str
    parts: Sequence[Part]
    axis: str = ""
    cost: bool = field(default=False)
    probe: bool = False
    labels: str = "row"

    @property
    def runs(self) -> str:
        """Where the runs stand, in a model's folder."""
        return PROBE_RECORD if self.probe else "sweep.jsonl"


def table_names() -> list[str]:
    """All tables that can be reproduced."""
    return sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.glob("*/*.yaml"))


def load_table(name: str) -> Table:
    """One table with everything that its file names.

    Raises:
        InputError: There is no such table.

    Example:
        >>> [part.model.path for part in load_table("atv/table_2").parts]
        ['llava-hf/llama3-llava-next-8b-hf', 'Qwen/Qwen2-VL-7B-Instruct']
    """
    file = FOLDER / f"{name}.yaml"
    if name not in table_names():
        raise InputError("", name, f"no such table; there are {', '.join(table_names())}{meant(name, table_names())}")
    content = load_yaml(file.read_text())
    parts = [_part(content | entry) for entry in content["models"]]
    published = [part.published for part in parts]
    cost = any("seconds" in table.columns for table in published)
    probe, labels = content.get("probe", False), content.get("labels") or content.get("axis") or "row"
    return Table(name, content["title"], parts, content.get("axis", ""), cost, probe, labels)


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks of the papers by name."""
    return {name: Benchmark(name, **values) for name, values in _shared("benchmarks").items()}


def calibration_sets() -> dict[str, dict[str, Any]]:
    """All calibration sets of the papers by name, as options of `data`."""
    return _shared("calibration")


def _part(entry: Mapping[str, Any]) -> Part:
    """Rows of one model, from its entry and what the table says for all models."""
    path = entry["path"]
    published = published_table(entry["published"], path, entry.get("average", ""), entry.get("transposed", ""))
    known = benchmarks()
    columns = entry.get("columns", published.columns)
    dense: Values = published.dense
    if "dense" in entry:
        dense = published_table(entry["dense"], path).dense
    rows = [
        Row(
            tuple(row["row"]),
            row.get("recipe", _PROBED),
            entry.get("options", {}) | row.get("options", {}),
            row.get("calibration") or entry["calibration"],
        )
        for row in entry["rows"]
    ]
    model = Checkpoint(path, **_shared("models")[path])
    return Part(model, [known.get(name, Benchmark(name)) for name in columns], rows, published, dense)


@cache
def _shared(name: str) -> dict[str, Any]:
    return load_yaml((FOLDER / f"{name}.yaml").read_text())


def _readable(label: Any) -> str:
    if isinstance(label, bool):
        return "adaptive budget" if label else "fixed budget"
    if isinstance(label, float):
        return f"{label:g}"
    return str(label)
