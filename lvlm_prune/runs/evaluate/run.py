"""One evaluation: a checkpoint, and if asked the dense one, scored by an engine.

check both, and the engine ─► launch processes ─► dense model ─► pruned model ─► evaluation.json, evaluation.md
(nothing written)                                 one in memory at a time        report.html beside them, once more
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lvlm_prune.clock import command_began
from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.launching import Launch
from lvlm_prune.errors import InputError, given_as
from lvlm_prune.evaluation.builtin import refuse_other_world
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.record import evaluation_record, evaluation_table, write_record
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.folder import choose_folder, refuse_other_content, writing
from lvlm_prune.output.locking import shared
from lvlm_prune.output.manifest import read_run
from lvlm_prune.output.names import (
    EVALUATION_RECORD,
    EVALUATION_TABLE,
    MODEL_CARD,
    PAGE_NAME,
    PRUNING_RECORD,
    RECOVERY_RECORD,
)
from lvlm_prune.output.private import is_left_out, private_folder, without_private
from lvlm_prune.output.provenance import origin_of, versions
from lvlm_prune.packed.folder import open_checkpoint
from lvlm_prune.plugins import describe, mounted
from lvlm_prune.report.card import refresh_card
from lvlm_prune.report.card_checks import is_edited
from lvlm_prune.report.refreshing import refresh_page
from lvlm_prune.run import Run, RunOptions, RunTrainer
from lvlm_prune.runs.session import join, session
from lvlm_prune.runs.unused import unused_of_engine
from lvlm_prune.threads import suitable_threads


class EvaluationRun:
    """See `LVLMTrainer.evaluate` for the arguments."""

    def __init__(self, trainer: RunTrainer, model: LVLMModule, baseline: str, engine: Engine, output: str) -> None:
        self.trainer, self.model, self.engine = trainer, model, engine
        self.run = Run(RunOptions(), trainer.config or {"model": model.options()}, Hardware.of(trainer))
        self.started = command_began()
        if "vision" in model.targets:
            raise InputError("model.targets", "vision", "does nothing here; the whole checkpoint is scored")
        model.open(open_checkpoint)
        assert model.folder is not None
        self.baseline: LVLMModule | None = None
        if baseline:
            self.baseline = LVLMModule(
                baseline,
                trust_remote_code=model.trust_remote_code,
                attn_implementation=model.attn_implementation,
            )
            with given_as("baseline"):
                self.baseline.open(open_checkpoint)
        refuse_other_world(engine, model)
        with mounted(engine=engine):
            engine.check()
        self.folder = self._output_folder(output, model.folder.path)

    def __call__(self) -> dict[str, Any]:
        """Score the checkpoints, and write the record."""
        launch = Launch(self.run.hardware, [])
        with session(self.trainer, self.run, launch, way_on=lambda: "") as run:
            join(run, launch)
            for line in unused_of_engine(self.engine, compares=self.baseline is not None):
                run.say(line)
            with suitable_threads(self.model.block_weights, run.hardware.devices), mounted(engine=self.engine):
                measured = self.engine.measure(self.model, self.baseline, run.processes, run.hardware.device)
                asked = self.engine.fingerprint()
            record = evaluation_record(measured) | ({"asked": asked} if asked else {}) | self._provenance()
            run.processes.on_main(lambda: self._write(record))
        return record

    def _output_folder(self, output: str, checkpoint: Path) -> Path:
        """Where to write: beside the record of the run that made the checkpoint, unless the user says otherwise.

        Raises:
            InputError: The folder holds something else, or cannot be written.
        """
        ours = any((checkpoint / name).is_file() for name in (PRUNING_RECORD, RECOVERY_RECORD))
        if not output and ours:
            folder = checkpoint
        else:
            folder = choose_folder(output, f"{self.model.label}-evaluation", resume=False)
        own = folder.resolve() == checkpoint.resolve()
        self._own = (["*"] if own else [EVALUATION_RECORD]), "evaluation"
        refuse_other_content(folder, *self._own)
        return folder

    def _is_publishable(self) -> bool:
        """Whether the run that made the folder left private data out, or may have: its record cannot be read."""
        names = [name for name in (RECOVERY_RECORD, PRUNING_RECORD) if (self.folder / name).is_file()]
        records = [read_run(self.folder / name) for name in names]
        return any(record is None or is_left_out(record) for record in records)

    def _provenance(self) -> dict[str, Any]:
        return {
            "model": _origin(self.model),
            "baseline": None if self.baseline is None else _origin(self.baseline),
            "engine": describe(self.engine),
            "config": describe(self.run.config),
            "versions": versions(),
            "processes": self.run.hardware.world_size,
            "device": str(self.run.hardware.device),
            "seconds": time.perf_counter() - self.started,
        }

    def _write(self, record: dict[str, Any]) -> None:
        for logger in self.run.hardware.loggers:
            found = {f"evaluation/{task}": entry["score"] for task, entry in record["tasks"].items()}
            names = ("average", "retention", "perplexity", "kl")
            found |= {f"evaluation/{name}": record[name] for name in names if record.get(name) is not None}
            logger.log_metrics(found)
            logger.finalize("success")
        with writing(self.folder, "the same command again scores once more"), shared(self.folder, *self._own):
            beside = private_folder(self.folder)
            places = [self.folder, *([beside] if (beside / PAGE_NAME).is_file() else [])]
            is_publishable, is_own_card = self._is_publishable(), is_edited(self.folder)

            def note() -> None:
                for place in places:
                    left_out = place == self.folder and is_publishable
                    write_record(place, without_private(record) if left_out else record)

            note()
            page, *_ = [refresh_page(place) for place in places]
            card = not is_own_card and refresh_card(self.folder)
            record["seconds"] = time.perf_counter() - self.started  # of the pages too, which show it nowhere
            note()
        more = [name for name, there in ((PAGE_NAME, page), (MODEL_CARD, card)) if there]
        written = " · ".join([EVALUATION_RECORD, EVALUATION_TABLE, *more])
        table = evaluation_table(record)
        self.run.say(f"{table}\nwrote {self.folder} ({written}) · {record['seconds']:.0f} s")
        if is_own_card:
            self.run.say(f"{MODEL_CARD} was changed since it was written and stays as it is, without these scores")


def _origin(module: LVLMModule) -> dict[str, Any]:
    assert module.folder is not None
    return origin_of(module.path, module.folder)
