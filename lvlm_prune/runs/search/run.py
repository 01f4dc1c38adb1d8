"""`prune --keep`: the highest sparsity at which a model keeps a given share, found by tries; then the run with it.

dense model's answers on held-back samples ─┐
for each recipe, cheapest first:            │
    sparsity ─► prune ─► agreement with ────┘ ─► enough? ─► a higher sparsity, or a lower one
best recipe and sparsity ─► prune, verify, score, report, as without `--keep`

Samples are caught, and the dense model is surveyed, once for all tries. A try is written beside the output folder, and
removed when it is measured; what came out is kept, so that the same command goes on behind the last try.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.data import CalibrationDataModule
from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.launching import Launch
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.base_record import name_of_input
from lvlm_prune.output.folder import choose_folder, going_on, refuse_unusable, writing
from lvlm_prune.output.locking import remove_unfinished
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import PRUNING_RECORD
from lvlm_prune.output.private import keeps_private
from lvlm_prune.output.reading import conforms
from lvlm_prune.output.records import TriedRecord
from lvlm_prune.output.units import readable_percent
from lvlm_prune.plugins import describe, plugin_class
from lvlm_prune.recipes import options_of_method, recipe_file
from lvlm_prune.run import Run, RunOptions, RunTrainer
from lvlm_prune.runs.prune.participants import Participants
from lvlm_prune.runs.prune.quality import SampleQuality
from lvlm_prune.runs.prune.run import PruneRun
from lvlm_prune.runs.prune.sharing import SharedCalibration
from lvlm_prune.runs.search.levels import LEVELS, Bracket, best_of, sparsity_of
from lvlm_prune.runs.session import join, prepare_source, session
from lvlm_prune.runs.sweep.grid import SPARSITY, Point, points_of
from lvlm_prune.runs.sweep.results import Results
from lvlm_prune.threads import suitable_threads

HELD_BACK = 64
"""Samples that a try is measured on, where there are as many: a percent must not be a single token."""

_WAY_ON = "the same command goes on behind the last try"

# What a line of results has for going on, and the record of the run need not repeat for each try.
_OF_LINE = ("identity", "calibration", "measured_on")

# What a recipe decides; other options of `pruning` are the user's for every recipe.
_OF_RECIPE = {"name", "sparsity", "pattern", "pool", "scorer", "solver", "allocation"}


class SearchRun:
    """See `LVLMTrainer.prune`.

    Args:
        trainer: Its loggers and progress bar.
        model: The model to prune.
        datamodule: The calibration set.
        output: Folder to write; empty for one of its own.
        options: What the user asked of the last run.
        keep: Share of the held-back tokens at which the most likely one must stay the dense model's.
        minutes: No try is begun that is expected to end later than this; 0 for no bound.
        recipes: Names of recipes that are tried before the configured method, cheapest first.

    Raises:
        InputError: One of these cannot be used.
    """

    def __init__(
        self,
        trainer: RunTrainer,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str,
        options: RunOptions,
        keep: float,
        minutes: float,
        recipes: Sequence[str],
    ) -> None:
        if not 0 < keep <= 1:
            raise InputError("keep", keep, "must be a share: above 0, at most 1")
        self.trainer, self.model, self.datamodule, self.options = trainer, model, datamodule, options
        self.keep, self.minutes, self.count = keep, minutes, max(HELD_BACK, options.held_back)
        self.run = Run(RunOptions(), trainer.config or {"model": model.options()}, Hardware.of(trainer))
        self.started, self.measured_on = time.monotonic(), ""
        model.open()
        if model.folder is None:
            raise InputError("keep", keep, "needs a checkpoint folder; a model in memory is pruned in place")
        self.pruning = self._pruning()
        self.candidates = self._candidates(recipes)
        name = f"{model.label}-keep{100 * keep:g}"
        self.folder = choose_folder(output, name, options.resume)
        private = keeps_private(
            options.publishable, {"model": {"path": model.path}, "config": describe(self.run.config)}
        )
        if not options.plan:  # of which the run itself says it
            refuse_unusable(self.folder, model.folder, PRUNING_RECORD, options.resume, private=private)
        self.results = Results(
            self.folder.with_name(f"{self.folder.name}.search"), "search.jsonl", kind="search"
        ).read()

    def __call__(self) -> Manifest:
        """Search, then prune with what was found; or only say what would be done."""
        if self.options.plan:
            self.run.say(f"up to {len(self.candidates) * LEVELS.bit_length()} tries like this one, and the run itself:")
            return self._final(self._point(*next(iter(self.candidates.items())), level=None), {})()
        launch = Launch(self.run.hardware, [])
        with session(self.trainer, self.run, launch, way_on=lambda: _WAY_ON):
            join(self.run, launch)
            try:
                return self._work(launch)
            finally:
                self.results.release()

    def _work(self, launch: Launch) -> Manifest:
        shared, began = SharedCalibration(launch), time.monotonic()
        found = self.run.processes.on_main(self._found_before)
        if found is None:
            found = self._search(launch, shared)
        elif not found.pop("is_complete"):
            self._quality(launch)
            self._refuse_other_held_back(found)
        self.run.say(f"{found['recipe']} at {readable_percent(found['sparsity'])} keeps {found['agreement']:.1%}")
        point = self._point(found["recipe"], self.candidates[found["recipe"]], found["level"])
        final = self._final(point, {**found, "seconds": time.monotonic() - began}, shared)
        manifest = final()
        self.run = final.run
        self.run.processes.on_main(self.results.remove)
        return manifest

    # ---- before the first try ----------------------------------------------------------------------------------------
    def _pruning(self) -> dict[str, Any]:
        """Options of the configured method, as plain data.

        Raises:
            InputError: No callback prunes, or its pattern gives the sparsity.
        """
        callback = Participants(self.trainer.callbacks).pruning
        if callback is None:
            raise InputError("keep", self.keep, "needs a pruning method")
        pruning = dict((self.trainer.config or {}).get("pruning") or describe(callback)["init_args"])
        if pruning.get("pattern", "unstructured") != "unstructured":
            raise InputError("pruning.pattern", pruning["pattern"], "gives the sparsity that --keep is to find")
        return pruning

    def _candidates(self, recipes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Name -> options of a method, in the order in which they are tried."""
        common = {name: value for name, value in self.pruning.items() if name not in _OF_RECIPE}
        found = {}
        for name in recipes:
            try:
                content = options_of_method(recipe_file(name), "keep_recipes")
            except InputError as error:
                raise InputError("keep_recipes", name, error.problem) from None
            if content.get("pattern", "unstructured") != "unstructured":
                problem = f"prunes {content['pattern']}, which gives the sparsity that --keep is to find"
                raise InputError("keep_recipes", name, problem)
            found[name] = {**content, **common}
        return found | {str(self.pruning.get("name") or "configured"): self.pruning}

    def _point(self, recipe: str, pruning: Mapping[str, Any], level: int | None) -> Point:
        options = {} if level is None else {SPARSITY: sparsity_of(level)}
        data = (self.trainer.config or {}).get("data") or describe(self.datamodule)["init_args"]
        return points_of(recipe, pruning, options, data, [self.datamodule.seed])[0]

    # ---- the tries ---------------------------------------------------------------------------------------------------
    def _found_before(self) -> dict[str, Any] | None:
        """What an earlier command found, whose last run was interrupted."""
        if not self.options.resume or not (self.folder / PRUNING_RECORD).is_file():
            return None
        record = Manifest.read(self.folder)
        found: dict[str, Any] = record.get("search") or {}
        if not conforms(found, TriedRecord) or found["recipe"] not in self.candidates or found.get("keep") != self.keep:
            problem = f"{self.folder} was not begun with this search"
            raise InputError("keep", self.keep, f"{problem}; repeat the command that began it, or write elsewhere")
        return found | {"is_complete": record.get("status") == "complete"}

    def _quality(self, launch: Launch) -> SampleQuality:
        """What tries are measured with; from here on it is known on which samples."""
        quality = SampleQuality(self.model, *self.datamodule.held_back(self.count), launch.fabric.device)
        prepare_source(self.model, self.datamodule.source)
        self.measured_on = self.run.processes.on_main(quality.fingerprint)
        return quality

    def _refuse_other_held_back(self, found: Mapping[str, Any]) -> None:
        """Refuse to go on with what was found on other samples than those that are held back now.

        Raises:
            InputError: They are others.
        """
        if found.get("measured_on") != self.measured_on:
            name = plugin_class(self.datamodule.source).__name__
            problem = f"gives other samples to measure on now than when {self.folder} was begun; write elsewhere"
            raise InputError("data.source", name, problem)

    def _search(self, launch: Launch, shared: SharedCalibration) -> dict[str, Any]:
        """The sparsest try that keeps enough.

        Raises:
            RunError: There is none.
        """
        quality = self._quality(launch)
        self.datamodule.setup("prune")
        if not quality.is_held_back:
            self.run.say(
                "tries are measured on calibration samples: the source has no others, give it more or take fewer"
            )
        brackets: dict[str, Bracket] = {}
        tries: list[dict[str, Any]] = []
        seconds = 0.0
        for recipe in self.candidates:
            brackets[recipe] = bracket = Bracket(low=max((one.low for one in brackets.values()), default=0))
            while (level := bracket.next()) and not self._is_late(seconds):
                record = self._try(recipe, level, quality, shared)
                seconds = record["seconds"]
                tries.append(record)
                bracket.note(level, record["agreement"] >= self.keep)
        best = best_of(brackets)
        if best is None:
            closest = max(tries, key=lambda one: one["agreement"])
            said = f"{closest['recipe']} at {readable_percent(closest['sparsity'])} keeps {closest['agreement']:.1%}"
            raise RunError(f"--keep {self.keep}: no try keeps as much; {said}")
        chosen = next(one for one in tries if (one["recipe"], one["level"]) == best)
        return {"keep": self.keep, "measured_on": self.measured_on, **chosen, "tries": tries}

    def _is_late(self, seconds: float) -> bool:
        """Whether another try as long as the last one, and the run itself, would end too late."""
        elapsed = self.run.processes.on_main(lambda: time.monotonic() - self.started)
        if not self.minutes or not seconds or elapsed + 2 * seconds <= 60 * self.minutes:
            return False
        self.run.say(f"no further try: it would end later than --keep_minutes {self.minutes:g}")
        return True

    def _try(self, recipe: str, level: int, quality: SampleQuality, shared: SharedCalibration) -> dict[str, Any]:
        point = self._point(recipe, self.candidates[recipe], level)
        identity = self._identity(point)
        processes = self.run.processes
        record = processes.on_main(lambda: self.results.records.get(identity))
        own = {"recipe": recipe, "level": level, "sparsity": sparsity_of(level)}
        if record is None or any(record[name] != value for name, value in own.items()):  # somebody changed it
            record = self._measured(point, quality, shared)
            record |= {"identity": identity, **own}
            record["measured_on"] = self.measured_on
            if processes.is_main:
                with writing(self.results.folder, _WAY_ON):
                    self.results.add(record)
        self._refuse_other_held_back(record)
        shared.expect(record.get("calibration"), self.datamodule.source)
        apart = float("inf") if record["kl"] is None else record["kl"]
        whose = f"the {record.get('input', 'dense')} model's"
        kept = f"{record['agreement']:.1%} of {whose} most likely tokens, KL {apart:.3g}"
        self.run.say(f"try: {recipe} at {readable_percent(record['sparsity'])}: {kept} · {record['seconds']:.0f} s")
        return {name: value for name, value in record.items() if name not in _OF_LINE}

    def _measured(self, point: Point, quality: SampleQuality, shared: SharedCalibration) -> dict[str, Any]:
        """Prune, measure, and remove what was written."""
        began, processes, folder = time.monotonic(), self.run.processes, self.results.folder / "try"
        with writing(self.results.folder, _WAY_ON):
            processes.on_main(self.results.begin)
        processes.on_main(lambda: remove_unfinished(folder))
        options = RunOptions(evaluate=False, report=False, quiet=True)
        with going_on(_WAY_ON):
            manifest = self._pruning_run(point, folder, options, shared=shared)()
        with suitable_threads(self.model.block_weights, self.run.hardware.devices):
            assert self.model.folder is not None
            written = self.model.folder.at(folder)
            found = processes.on_main(lambda: quality(written))
        processes.on_main(lambda: remove_unfinished(folder))
        if "not_measured" in found:
            raise RunError(f"--keep {self.keep}: tries cannot be measured: {found['not_measured']}")
        calibration = manifest["calibration"].get("fingerprint")
        told = {"input": name_of_input(manifest), "calibration": calibration}
        return {**found, **told, "seconds": time.monotonic() - began}

    def _identity(self, point: Point) -> str:
        """What a try depends on: its configuration, the model, what it is measured on, and which version does it."""
        assert self.model.folder is not None
        common = [self.model.folder.fingerprint(), str(self.model.compute_dtype), self.count, lvlm_prune.__version__]
        return hashlib.sha256(json.dumps([point.identity, *common]).encode()).hexdigest()[:32]

    # ---- the run -----------------------------------------------------------------------------------------------------
    def _final(self, point: Point, found: Mapping[str, Any], shared: SharedCalibration | None = None) -> PruneRun:
        # Measured on the samples of the tries, so that one number is said, not two.
        options = replace(self.options, held_back=self.count if self.options.held_back else 0)
        final = self._pruning_run(point, self.folder, options, _SearchRecord(found), shared=shared)
        final.run.began = self.run.began  # the tries belong to the command's time
        return final

    def _pruning_run(
        self, point: Point, folder: Path, options: RunOptions, *more: Callback, shared: SharedCalibration | None
    ) -> PruneRun:
        pruning, data = point.instantiate()
        callbacks = [pruning, *self._others(), *more]
        config = point.run_config(self.run.config)
        return PruneRun(self.trainer, self.model, data, str(folder), options, callbacks, config, shared=shared)

    def _others(self) -> list[Callback]:
        return [callback for callback in self.trainer.callbacks if not isinstance(callback, BlockwisePruning)]


class _SearchRecord(Callback):
    """Keeps in the manifest what was tried."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = dict(found)

    def on_prune_start(self, trainer: RunTrainer, pl_module: LVLMModule) -> None:
        """Note it before anything is written."""
        if self._found:
            trainer.run.record["search"] = self._found
