"""Rows of a table of the probe: a pathway is pruned in each, and an engine scores the model with two pathways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.output.folder import going_on
from lvlm_prune.output.names import PROBE_RECORD
from lvlm_prune.runs.probe.run import ProbeRun
from lvlm_prune.runs.reproduce.tables import Part
from lvlm_prune.runs.sweep.grid import Point
from lvlm_prune.runs.sweep.results import FinishedRun
from lvlm_prune.runs.sweep.run import WAY_ON

if TYPE_CHECKING:
    from lvlm_prune.callbacks import ModalityProbe
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.output.manifest import Manifest
    from lvlm_prune.run import RunTrainer

_FIELDS = ("pathway", "pool", "sparsity")


def probe_of(part: Part) -> ModalityProbe:
    """The probe whose grid has every row of a table; nothing is drawn but the overlap of masks."""
    from lvlm_prune.callbacks import ModalityProbe

    pathways, pools, sparsities = (list(dict.fromkeys(column)) for column in zip(*(row.labels for row in part.rows)))
    return ModalityProbe(pathways, pools, sparsities, map_tokens=0, curve_samples=0)


def probe_rows(
    trainer: RunTrainer,
    model: LVLMModule,
    part: Part,
    points: Sequence[Point],
    engine: Engine,
    folder: Path,
    check_dense: Callable[[Scores], None] | None,
) -> tuple[list[list[FinishedRun]], Scores]:
    """Probe once for each calibration seed, or go on where an earlier command stopped.

    Args:
        trainer: Runs the probe.
        model: The dense model.
        part: The rows.
        points: One for each seed; its `data` calibrates.
        engine: Scores the dense model and every cell.
        folder: Where the probes are written, a folder for each seed.
        check_dense: See `ProbeRun`.

    Returns:
        The runs of each row, and the scores of the dense model.
    """
    records = []
    for point in points:
        output = folder / f"seed-{point.seed}"
        resume = (output / PROBE_RECORD).is_file()
        run = ProbeRun(trainer, model, point.instantiate()[1], str(output), resume, True, probe_of(part), engine)
        run.check_dense = check_dense
        with going_on(WAY_ON):
            records.append((point, run()))
    dense = Scores.from_dict(records[0][1]["dense"])
    return [[_finished(row.labels, *record) for record in records] for row in part.rows], dense


def _finished(labels: tuple[Any, ...], point: Point, record: Manifest) -> FinishedRun:
    """The cell of a row."""
    (cell,) = [cell for cell in record["grid"] if tuple(cell[name] for name in _FIELDS) == labels]
    options: Mapping[str, Any] = dict(zip(_FIELDS, labels))
    scores = Scores.from_dict(cell["scores"])
    kept = retention(scores, Scores.from_dict(record["dense"]))
    return FinishedRun(Point("probe", options, point.seed, point.config), cell, scores, kept)
