"""One table of a paper, run again: a sweep for each of its models, and what came out beside what was published.

table ─► rows as points ─► for each model: sweep (caught and surveyed once, resumable, in parts) ─► table.md, table.csv,
         (all checked)                     DIR/<model>/sweep.jsonl                                  report.html
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lvlm_prune.errors import InputError, meant, shortened
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.harness import TASKS, LMMSEvalEngine
from lvlm_prune.output.folder import named_folder, refuse_other_content, write_config, writing
from lvlm_prune.output.locking import shared
from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.names import PROBE_RECORD
from lvlm_prune.plugins import describe, mounted
from lvlm_prune.recipes import options_of_method, recipe_file
from lvlm_prune.runs.reproduce.harness import Harness
from lvlm_prune.runs.reproduce.outcome import PartOutcome, part_outcome
from lvlm_prune.runs.reproduce.page import write_table_page
from lvlm_prune.runs.reproduce.pathways import probe_rows
from lvlm_prune.runs.reproduce.tables import Part, Table, calibration_sets
from lvlm_prune.runs.reproduce.text import csv_text, heading, markdown_text
from lvlm_prune.runs.sweep.grid import SPARSITY, Point, by_data, points_of
from lvlm_prune.runs.sweep.run import WAY_ON, SweepRun

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer
    from lvlm_prune.runs.sweep.results import FinishedRun

_TABLE = "table.md"
# What the output folder may hold, and what that is.
_OWN = [_TABLE, "*/sweep*.jsonl", f"*/*/{PROBE_RECORD}"], "reproduced table"
_LONGEST_HEADING = 1000


@dataclass(frozen=True)
class TablePoints:
    """The rows of one model as runs of a sweep.

    Args:
        rows: The runs of each row, one for each seed.
    """

    rows: Sequence[Sequence[Point]]

    @property
    def options(self) -> Mapping[str, Sequence[Any]]:
        """Nothing is varied in all combinations."""
        return {}

    def points(self) -> list[Point]:
        """All runs, each once, those on the same calibration set together."""
        return by_data({point.identity: point for row in self.rows for point in row}.values())


def table_points(part: Part, seeds: Sequence[int], calibration: Mapping[str, Mapping[str, Any]]) -> TablePoints:
    """What has to be run for the rows of one model.

    Args:
        part: The rows.
        seeds: Calibration seeds.
        calibration: Name of a calibration set -> options of `data`, taken instead of the papers'.

    Raises:
        InputError: A set is unknown, or the table's file names an option that the recipe does not take.
    """
    known = calibration_sets()
    if unknown := next((name for name in calibration if name not in known), None):
        raise InputError("calibration", unknown, f"no such set; there are {', '.join(known)}{meant(unknown, known)}")
    for name, given in calibration.items():
        if not isinstance(given, Mapping):
            problem = f"expected options of `data`, for example {{num_samples: 64}}, not {shortened(given)}"
            raise InputError("calibration", name, problem)
    rows = []
    for row in part.rows:
        pruning = options_of_method(recipe_file(row.recipe), "table")
        # The command line makes objects of what names a class; a point is plain data.
        data = describe(calibration.get(row.calibration, known[row.calibration]))
        points = points_of(row.recipe, pruning, row.options, data, seeds)
        if ignored := sorted(set(row.options) - set(points[0].options) - {SPARSITY}):
            raise InputError("table", ignored[0], f"is no option of the recipe {row.recipe}")
        rows.append(points)
    return TablePoints(rows)


def table_engine(part: Part, harness: Harness) -> tuple[LMMSEvalEngine, dict[str, str]]:
    """lmms-eval on the benchmarks of a table, and benchmark -> name under which it is scored.

    Args:
        part: What is measured.
        harness: How.
    """
    metrics: dict[str, list[str]] = {}
    for benchmark in part.measured:
        metrics.setdefault(benchmark.task, []).append(benchmark.metric)
    names = {
        benchmark.name: benchmark.task if len(metrics[benchmark.task]) == 1 else f"{benchmark.task}:{benchmark.metric}"
        for benchmark in part.measured
    }
    engine = LMMSEvalEngine(
        list(metrics),
        harness.python,
        part.model.harness,
        dict(harness.model_args),
        harness.limit,
        list(harness.arguments),
        {task: ",".join(wanted) for task, wanted in metrics.items()},
        {names[benchmark.name]: benchmark.best for benchmark in part.measured},
    )
    return engine, names


class ReproductionRun:
    """See `LVLMTrainer.reproduce` for the arguments."""

    def __init__(
        self,
        trainer: RunTrainer,
        table: Table,
        model: LVLMModule,
        output: str,
        part: str,
        seeds: Sequence[int],
        calibration: Mapping[str, Mapping[str, Any]],
        harness: Harness,
        engine: Engine | None,
        tasks: Mapping[str, str],
        keep: bool,
    ) -> None:
        self.trainer, self.table, self.model = trainer, table, model
        self.part, self.keep, self.engine = part, keep, engine
        self.harness, self.tasks = harness, dict(tasks)
        model.refuse_vision("reproduce")
        self.folder = named_folder(output or f"runs/{table.name.replace('/', '-')}")
        refuse_other_content(self.folder, *_OWN)
        self._refuse_other_table()
        if trainer.world_size > 1 and len(table.parts) > 1:
            problem = f"{table.name} has {len(table.parts)} models, each of which starts its own processes; run parts"
            raise InputError("trainer.devices", trainer.num_devices, f"{problem} of it with --part on one device each")
        for entry in table.parts:
            if entry.model.missing and not model.path:
                raise InputError("model.path", entry.model.path, entry.model.missing)
        if table.probe and (part or keep):
            option, value = ("part", part) if part else ("keep", keep)
            problem = f"{table.name} is the probe's, which is run in one piece and leaves no checkpoints"
            raise InputError(option, value, problem)
        if tasks and engine is None:
            raise InputError("tasks", tasks, "names tasks of --engine, which is not given")
        known = {benchmark.name for entry in table.parts for benchmark in entry.benchmarks}
        if unknown := sorted(set(tasks) - known):
            problem = f"is no column of {table.name}; there are {', '.join(sorted(known))}"
            raise InputError("tasks", unknown[0], problem + meant(unknown[0], known))
        if engine is not None and not tasks:
            problem = f"says for no column of {table.name} which task of --engine it is; there are"
            raise InputError("tasks", "{}", f"{problem} {', '.join(sorted(known))}")
        self.points = [table_points(entry, seeds, calibration) for entry in table.parts]
        for entry in table.parts:
            engine_of_part, names = self._engine(entry)
            with mounted(**{"harness" if engine is None else "engine": engine_of_part}):
                engine_of_part.check()
            if known_tasks := engine_of_part.task_names():
                _refuse_absent(names, known_tasks)
        self._check_samples(calibration)
        self.calibration = dict(calibration)

    def _check_samples(self, calibration: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse calibration sets that are not there, before anything is written."""
        first: dict[str, tuple[str, Point]] = {}
        for entry, points in zip(self.table.parts, self.points):
            for row, of_row in zip(entry.rows, points.rows):
                for point in of_row:
                    first.setdefault(point.data_key, (row.calibration, point))
        for name, point in first.values():
            try:
                point.instantiate()[1].setup("prune")
            except InputError as error:
                given = "{source: {class_path: LlavaJsonSource, init_args: {path: FILE}}, num_samples: 128}"
                way = f"; --calibration '{{{name}: {given}}}' names what you have in its place"
                way = "" if name in calibration else way
                option = f"calibration.{name}.{error.option.removeprefix('data.')}"
                raise InputError(option, error.value, error.problem + way) from None

    def _stand_ins(self, entry: Part, names: Mapping[str, str], scored: Collection[str]) -> list[str]:
        """What was not as in the paper, in sentences; `scored` are all tasks that the engine scores."""
        found = []
        if self.engine is not None:
            by = type(self.engine).__name__
            found.append(
                "Other benchmarks than the paper's: "
                + ", ".join(f"{column} is `{task}` of {by}" for column, task in names.items())
                + "."
            )
            if besides := len(set(scored) - set(names.values())):
                shown = len(scored) - besides
                found.append(
                    f"{by} scores {len(scored)} tasks, of which {shown} stand{'s' * (shown == 1)} here: shares on the "
                    f"screen and in the folders of the models are over all."
                )
        elif self.harness.limit is not None:
            found.append(f"Only {self.harness.limit} questions of each benchmark were asked.")
        if others := sorted({row.calibration for row in entry.rows} & self.calibration.keys()):
            found.append(f"Calibrated on samples that --calibration names in the place of {', '.join(others)}.")
        return found

    def __call__(self) -> list[PartOutcome]:
        """Sweep over one model after the other, and write the table after each."""
        outcomes: list[PartOutcome] = []
        if self.trainer.is_global_zero:
            with writing(self.folder, WAY_ON), shared(self.folder, *_OWN):
                self._refuse_other_table()
                if not (self.folder / _TABLE).is_file():
                    replace_durably(self.folder / _TABLE, markdown_text(self.table, outcomes).encode())
        for entry, points in zip(self.table.parts, self.points):
            try:
                outcomes.append(self._measure(entry, points))
            except InputError as error:
                if self.engine is not None or error.option != TASKS:
                    raise
                problem = f"its lmms_eval has no task {error.value}; tables were declared for release 0.7.3"
                named = InputError("harness.python", self.harness.python or sys.executable, problem)
                named.agreed = error.agreed
                raise named from None
            if self.trainer.is_global_zero:
                self._write(outcomes)
        where = f"wrote {self.folder} · table.md · table.csv · report.html"
        if self.trainer.is_global_zero:
            print(f"{markdown_text(self.table, outcomes)}\n{where}", flush=True)
        return outcomes

    def _measure(self, entry: Part, points: TablePoints) -> PartOutcome:
        from lvlm_prune.module import LVLMModule

        given = self.model
        module = LVLMModule(
            given.path or entry.model.path,
            given.dtype_option,
            given.revision if given.path else "main",
            trust_remote_code=given.trust_remote_code,
            attn_implementation=given.attn_implementation,
        )
        engine, names = self._engine(entry)
        folder = self.folder / folder_name(entry)
        if self.table.probe:
            rows, dense = probe_rows(
                self.trainer,
                module,
                entry,
                points.rows[0],
                engine,
                folder,
                lambda dense: _refuse_absent(names, dense.tasks),
            )
            outcome = part_outcome(entry, module.path, names, rows, dense)
            return replace(outcome, stand_ins=self._stand_ins(entry, names, dense.tasks))
        sweep = SweepRun(self.trainer, module, points, engine, str(folder), self.part, self.keep, "")
        sweep.check_dense = lambda dense: _refuse_absent(names, dense.tasks)
        runs: dict[str, FinishedRun] = {run.point.identity: run for run in sweep()}
        rows = [[runs[point.identity] for point in row if point.identity in runs] for row in points.rows]
        outcome = part_outcome(entry, module.path, names, rows, sweep.dense)
        return replace(outcome, stand_ins=self._stand_ins(entry, names, sweep.dense.tasks))

    def _engine(self, entry: Part) -> tuple[Engine, dict[str, str]]:
        """What scores the checkpoints of one model, and benchmark -> name under which it is scored."""
        if self.engine is None:
            return table_engine(entry, self.harness)
        columns = {benchmark.name for benchmark in entry.benchmarks}
        return self.engine, {name: task for name, task in self.tasks.items() if name in columns}

    def _refuse_other_table(self) -> None:
        path = self.folder / _TABLE
        if not path.is_file():
            return
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline(_LONGEST_HEADING).strip()
        if first != f"# {heading(self.table)}":
            raise InputError("output", self.folder, f"holds another table ({first}); choose another folder")

    def _write(self, outcomes: Sequence[PartOutcome]) -> None:
        with writing(self.folder, WAY_ON):
            replace_durably(self.folder / _TABLE, markdown_text(self.table, outcomes).encode())
            replace_durably(self.folder / "table.csv", csv_text(outcomes).encode())
            # As in a sweep: the folder is of all parts.
            config = {name: value for name, value in (self.trainer.config or {}).items() if name != "part"}
            if config:
                write_config(self.folder, config)
            write_table_page(self.folder, self.table, outcomes, config)


def _refuse_absent(names: Mapping[str, str], scored: Collection[str]) -> None:
    """Refuse columns whose task has no score.

    Args:
        names: Column -> task.
        scored: Tasks that the engine scores.
    """
    if absent := sorted(set(names.values()) - set(scored)):
        problem = f"is not scored by the engine, which scores {', '.join(scored)}"
        raise InputError("tasks", absent[0], problem + meant(absent[0], scored))


def folder_name(entry: Part) -> str:
    """Where the sweep over one model is kept, in the output folder."""
    return entry.model.path.rpartition("/")[2]
