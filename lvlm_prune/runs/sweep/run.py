"""One sweep: every point of a grid is pruned, scored and noted; then table, figure and page are written.

check all points ─► launch processes ─► dense model scored ─► for each calibration set: caught once, surveyed once
(nothing written)                                               for each point: prune ─► verify ─► score ─► one line
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import lvlm_prune
from lvlm_prune.callbacks import RetentionEvaluation
from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.launching import Launch
from lvlm_prune.errors import InputError, LVLMPruneError, RunError
from lvlm_prune.evaluation.builtin import refuse_other_world
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.scores import Scores, refuse_unanswered
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.folder import going_on, named_folder, refuse_overlap, write_config, writing
from lvlm_prune.output.locking import remove_unfinished
from lvlm_prune.output.manifest import Manifest, replace_durably
from lvlm_prune.output.own_files import records_of, refuse_changed
from lvlm_prune.output.records import FileRecord
from lvlm_prune.plugins import describe, mounted
from lvlm_prune.report.card import read_card
from lvlm_prune.report.card_checks import verify_card
from lvlm_prune.run import Run, RunOptions, RunTrainer
from lvlm_prune.runs.prune.run import PruneRun
from lvlm_prune.runs.prune.sharing import SharedCalibration
from lvlm_prune.runs.publishing import Publication
from lvlm_prune.runs.session import join, prepare_source, session
from lvlm_prune.runs.sweep.grid import Point, Points
from lvlm_prune.runs.sweep.page import write_sweep_page
from lvlm_prune.runs.sweep.results import (
    DENSE,
    FinishedRun,
    Results,
    finished_runs,
    record_identity,
    share,
    was_asked_the_same,
)
from lvlm_prune.runs.sweep.tables import csv_table, markdown_table, summary, swept_option
from lvlm_prune.runs.unused import unused_of_engine

# Bytes of the name of a checkpoint's folder, without what follows; a name may have 255.
_LONGEST_NAME = 200
WAY_ON = "the same command goes on behind the last finished run"
"""What an interrupted sweep says."""


class SweepRun:
    """See `LVLMTrainer.sweep` for the arguments.

    Attributes:
        dense: Scores of the dense model, once they are known.
        check_dense: Refuses scores of the dense model that will not do, before anything is pruned.
    """

    dense: Scores
    check_dense: Callable[[Scores], None] | None = None

    def __init__(
        self,
        trainer: RunTrainer,
        model: LVLMModule,
        grid: Points,
        engine: Engine,
        output: str,
        part: str,
        keep: bool,
        across: str,
    ) -> None:
        self.trainer, self.model, self.engine = trainer, model, engine
        self.keep = keep
        self.run = Run(RunOptions(), trainer.config or {"model": model.options()}, Hardware.of(trainer))
        self.across = swept_option(across, grid.options)
        model.refuse_vision("sweep")
        model.open()
        if model.folder is None:
            raise InputError("model.path", model.path, "a sweep needs a checkpoint folder")
        refuse_other_world(engine, model)
        with mounted(engine=engine):
            engine.check()
        self.points = grid.points()
        self.mine = share(self.points, part) if part else self.points
        self.folder = named_folder(output or f"runs/{model.label}-sweep")
        refuse_overlap(self.folder, model.folder.path)
        name = f"sweep-{part.replace('/', 'of')}.jsonl" if part else "sweep.jsonl"
        self.results = Results(self.folder, name).read()
        self.key = self._key()
        self._check_points()

    def __call__(self) -> list[FinishedRun]:
        """Prune and score what is not yet done, and write what is known."""
        launch = Launch(self.run.hardware, [])
        with session(self.trainer, self.run, launch, way_on=lambda: WAY_ON) as run:
            join(run, launch)
            try:
                return self._work(launch)
            except LVLMPruneError:
                if run.processes.is_main:
                    self.results.forget_beginning()
                raise
            finally:
                self.results.release()

    def _work(self, launch: Launch) -> list[FinishedRun]:
        run = self.run
        self.results.records = run.processes.on_main(self._begin)
        pending = [point for point in self.mine if not self._is_finished(point)]
        run.say(f"{len(self.mine)} runs, {len(self.mine) - len(pending)} of them finished already")
        for line in unused_of_engine(self.engine, compares=True, likelihoods=False):
            run.say(line)
        self.dense = dense = self._dense_scores()
        done = len(self.mine) - len(pending)
        for _, group in groupby(pending, key=lambda point: point.data_key):
            points = list(group)
            shared = SharedCalibration(launch, self._calibrated_before(points[0].data_key))
            for point in points:
                record = self._prune(point, dense, shared)
                done += 1
                place = f"[{done}/{len(self.mine)}] {point.label}"
                run.say(f"{place}: {100 * record['retention']:.1f}% retained · pruned in {record['seconds']:.1f} s")
        runs = finished_runs(self.points, self.results.read().records, self.key, dense)
        run.processes.on_main(lambda: self._write(runs, dense))
        return runs

    def _begin(self) -> dict[str, dict[str, Any]]:
        """What is finished, and from here on no other process does the same runs."""
        with writing(self.folder, WAY_ON):
            self.results.begin()
        return self.results.records

    # ---- before the first run ----------------------------------------------------------------------------------------
    def _key(self) -> str:
        """What all runs have in common: the checkpoint, how and by which version it is run, and what is asked."""
        model = self.model
        assert model.folder is not None
        common = {
            "model": model.folder.fingerprint(),
            "dtype": str(model.compute_dtype),
            "attention": model.attn_implementation,
            "engine": describe(self.engine),
            "version": lvlm_prune.__version__,  # another one may prune otherwise
        }
        if asked := self.engine.fingerprint():
            common["asked"] = asked
        return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]

    def _check_points(self) -> None:
        """Refuse what no run could do, before the first one starts."""
        checked: set[str] = set()
        for point in self.mine:
            pruning, data = point.instantiate()
            try:
                pruning.plan(self.model)
                if point.data_key not in checked:
                    data.setup("prune")
                    checked.add(point.data_key)
            except InputError as error:
                raise InputError(error.option, error.value, f"{error.problem} (in {point.label})") from None
            prepare_source(self.model, data.source)

    # ---- the runs ----------------------------------------------------------------------------------------------------
    def _is_finished(self, point: Point) -> bool:
        record = self.results.records.get(record_identity(point, self.key))
        if record is None:
            return False
        dense = self.results.records.get(f"{DENSE}{self.key}")
        if dense is not None and not was_asked_the_same(record, Scores.from_dict(dense["scores"])):
            return False
        return not self.keep or self._is_kept(point, record)

    def _is_kept(self, point: Point, record: Mapping[str, Any]) -> bool:
        """Whether the checkpoint of a finished run is there; it is held against what was written.

        Raises:
            InputError: A file of it is missing or has changed; names it.
        """
        folder = self._checkpoint(point)
        if folder.is_dir() and self.run.processes.is_main:
            refuse_changed(folder, record.get("files", {}))
            assert self.model.folder is not None
            if line := verify_card(folder, read_card(self.model.folder.path), is_dense=True):
                self.run.say(f"{folder}: {line}")
        return folder.is_dir()

    def _checkpoint(self, point: Point) -> Path:
        """Where the run writes; without `keep` only until it is scored."""
        name = point.label.replace(" · ", "_").replace(" ", "-").replace("/", "-").replace(":", "of")
        name = "".join(sign if sign.isprintable() else "-" for sign in name)
        name = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
        return self.folder / ("checkpoints" if self.keep else "unfinished") / f"{name}-{point.identity[:6]}"

    def _dense_scores(self) -> Scores:
        """Scores of the dense model, which are noted once they have been found to do."""
        identity = f"{DENSE}{self.key}"
        if known := identity in self.results.records:
            scores = Scores.from_dict(self.results.records[identity]["scores"])
        else:
            assert self.model.folder is not None
            run = self.run
            scores = self.engine.score(self.model.folder.path, run.processes, run.hardware.device, "dense")
        refuse_unanswered(scores)
        if self.check_dense is not None:
            self.check_dense(scores)
        if not known:
            self._note({"identity": identity, "model": self.model.path, "scores": scores.to_dict()})
        return scores

    def _calibrated_before(self, data_key: str) -> str | None:
        """Fingerprint of the samples of the finished runs on a calibration set."""
        identities = [record_identity(point, self.key) for point in self.points if point.data_key == data_key]
        found = (self.results.records.get(identity, {}).get("calibration") for identity in identities)
        return next((fingerprint for fingerprint in found if fingerprint), None)

    def _prune(self, point: Point, dense: Scores, shared: SharedCalibration) -> dict[str, Any]:
        processes, folder = self.run.processes, self._checkpoint(point)
        pruning, data = point.instantiate()
        processes.on_main(lambda: remove_unfinished(folder))
        options = RunOptions(evaluate=False, report=self.keep, quiet=True)
        callbacks = [pruning, RetentionEvaluation(self.engine, dense), *self.trainer.callbacks]
        config = point.run_config(self.run.config)
        single = PruneRun(self.trainer, self.model, data, str(folder), options, callbacks, config, shared=shared)
        try:
            with going_on(WAY_ON):
                manifest = single()
        except RunError as error:
            wrapped = RunError(f"{point.label}: {error}")
            wrapped.agreed = error.agreed
            raise wrapped from None
        record = self._record(point, manifest)
        if self.keep:
            Publication()(folder, quiet=True)
        else:
            processes.on_main(lambda: self._remove(folder))
        self._note(record)
        return record

    @staticmethod
    def _remove(folder: Path) -> None:
        with suppress(InputError, OSError):  # another process may be at work there
            remove_unfinished(folder)
            folder.parent.rmdir()

    def _record(self, point: Point, manifest: Manifest) -> dict[str, Any]:
        budget = manifest.get("mean_visual_tokens")
        return {
            "identity": record_identity(point, self.key),
            "recipe": point.recipe,
            "method": manifest["method"]["init_args"]["name"],
            "options": dict(point.options),
            "seed": point.seed,
            "model": {name: manifest["model"][name] for name in ("path", "fingerprint")},
            "calibration": manifest["calibration"].get("fingerprint"),
            "sparsity": manifest["sparsity"],
            "seconds": manifest.get("work_seconds", manifest["seconds"]),
            "cost": manifest.cost(),
            "scores": manifest["evaluation"]["pruned"],
            "retention": manifest["evaluation"]["retention"]["average"],
            **({} if budget is None else {"mean_visual_tokens": budget}),
            **({"files": self._files(point, manifest)} if self.keep else {}),
            **_along_blocks(manifest),
        }

    def _files(self, point: Point, manifest: Manifest) -> dict[str, FileRecord]:
        """Size and digest of every file of a kept checkpoint; evaluations and pages may be written again."""
        folder = self._checkpoint(point)
        return manifest["files"] | records_of(folder, folder.glob("*.safetensors"))

    def _note(self, record: dict[str, Any]) -> None:
        if self.run.processes.is_main:
            with writing(self.folder, WAY_ON):
                self.results.add(record)
        self.results.records[record["identity"]] = record

    # ---- after the last run ------------------------------------------------------------------------------------------
    def _write(self, runs: list[FinishedRun], dense: Scores) -> None:
        missing = len(self.points) - len(runs)
        note = f"{missing} of {len(self.points)} runs are still to be done." if missing else ""
        table = markdown_table(runs, self.across) if runs else ""
        text = "\n\n".join(part for part in (summary(dense), table, note) if part) + "\n"
        with writing(self.folder, WAY_ON):
            # The folder is of all parts, and so is the command that its page repeats.
            write_config(self.folder, {name: value for name, value in self.run.config.items() if name != "part"})
            replace_durably(self.folder / "sweep.csv", csv_table(runs).encode())
            replace_durably(self.folder / "sweep.md", text.encode())
            if runs:
                write_sweep_page(self.folder, self.model.label, runs, dense, self.across, note, self.run.config)
        self.run.say(f"{text}\nwrote {self.folder} · sweep.md · sweep.csv" + (" · report.html" if runs else ""))


def _along_blocks(manifest: Manifest) -> dict[str, Any]:
    """What is worth drawing over the blocks: mean drift, and the sparsity of each kind of Linear where it varies."""
    found: dict[str, Any] = {}
    drift = [block["mean_drift"] for block in manifest["blocks"] if "mean_drift" in block]
    if drift:
        found["drift"] = drift
    kinds: dict[str, list[float]] = {}
    for name, linear in manifest["linears"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append(linear["achieved"])
    targets = {linear["target"] for linear in manifest["linears"].values()}
    if len(targets) > 1:
        found["sparsity_by_kind"] = kinds
    return found
