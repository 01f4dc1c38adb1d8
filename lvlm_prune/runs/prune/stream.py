"""The calibration samples on their way: caught, placed where there is room, surveyed, streamed through the blocks.

What callbacks may rely on lies in the `Run`: its samples, memory, weights and record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lvlm_prune.blocks import Part, Weights
from lvlm_prune.callbacks import PluginSurvey
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.data import CalibrationDataModule
from lvlm_prune.loop import BlockLoop
from lvlm_prune.loop.activations import SampleRow, batches_of
from lvlm_prune.loop.catching import Catcher, CaughtSamples
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.methods.survey import surveyed_samples
from lvlm_prune.module import LVLMModule
from lvlm_prune.run import Run
from lvlm_prune.runs.prune.participants import Participants
from lvlm_prune.runs.prune.sharing import SharedCalibration, survey_key


class CalibrationStream:
    """Takes the samples of a run from before the first block to behind the last one.

    Args:
        run: Its processes are together, its weights and its memory are set.
        model: The opened model.
        datamodule: The calibration set.
        participants: The callbacks, and what they ask for.
        device: Where the model runs.
        raise_hook: Called as `raise_hook(name, **arguments)`.
        shared: What the run has in common with others on the same samples.
    """

    def __init__(
        self,
        run: Run,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        participants: Participants,
        device: torch.device,
        raise_hook: Callable[..., None],
        shared: SharedCalibration | None = None,
    ) -> None:
        self._run, self._model, self._participants, self._raise_hook = run, model, participants, raise_hook
        # Behind a tower that is pruned first the samples are others in each run.
        self._shared = shared if len(model.parts) == 1 else None
        self._device, self._datamodule = device, datamodule
        self._catcher = Catcher(model, datamodule, device, run.processes, run.memory, participants.visual())

    def catch(self, part: Part) -> None:
        """Have the samples wait at the first block of `part`, where there is room, if anybody needs them.

        What comes before it may be pruned already.
        """
        run = self._run
        if self._participants.samples():
            picture = run.samples.picture
            run.samples = CaughtSamples()
            run.memory.forget()
            samples = self._samples_at(part)
            run.samples = replace(samples, picture=picture or samples.picture)
            run.record["calibration"] |= samples.calibration
        if (method := self._participants.method()) is not None:
            earlier = run.record.get("memory", {})
            run.record["memory"] = run.memory.settle(self._model, part, method, earlier)

    def _samples_at(self, part: Part) -> CaughtSamples:
        """The samples at the first block of `part`; other runs on the same ones may have caught them."""
        shared = self._shared
        if shared is not None and shared.samples is not None:
            samples = shared.samples.fork()
            for batch, size in zip(batches_of(samples.rows), samples.sizes, strict=True):
                self._run.memory.hold(batch, size)
            return samples
        samples = self._catcher.catch(part, self._weights_of(part), self._written() if part.first > 0 else None)
        if shared is not None:
            shared.refuse_other_samples(samples.calibration["fingerprint"], self._datamodule.source)
            shared.samples = samples.fork()
        return samples

    def survey(self) -> None:
        """Look at the dense model before any block is pruned, unless an interrupted run already did.

        Findings are in `record["survey"]` afterwards, and the samples are where they were: at the input of block 0.
        """
        run, record = self._run, self._run.record
        shared, key = self._shared, self._survey_key()
        if shared is not None and key is not None and (found := shared.take_survey(key)) is not None:
            record["survey"] = found
        if record.get("survey"):
            self._raise_hook("on_survey_restored")
            return
        clock = Stopwatch(self._device)
        record["survey"] = {}
        done = self._surveyed_already()
        counts = [getattr(callback, "survey_samples", None) for callback in self._participants.surveying()]
        wanted = frozenset().union(*(surveyed_samples(count, run.samples.numbers) for count in counts))
        rows = [row for row in run.samples.rows if row.sample in wanted]
        asking = self._participants
        part, needs, gathers = self._model.parts[-1], asking.survey_needs, asking.survey_gathers
        loop = self._loop(part, run.weights, rows, needs, gathers).fork()
        self._raise_hook("on_survey_start")
        forwards = run.processes.sum(torch.tensor([float(loop.survey(done.get("blocks", 0)))], dtype=torch.float64))
        record.pop("surveying", None)
        record["survey"] |= {
            "block_forwards": done.get("block_forwards", 0) + int(forwards.item()),
            "seconds": done.get("seconds", 0.0) + clock.lap(),
        }
        self._raise_hook("on_survey_end")
        if shared is not None and key is not None:
            shared.keep_survey(key, record["survey"])

    def _surveyed_already(self) -> dict[str, Any]:
        """What an interrupted run noted after the last block that it surveyed; empty where the survey begins anew."""
        found, asking = self._run.record.get("surveying", {}), self._participants.surveying()
        known = {name for callback in asking if isinstance(callback, PluginSurvey) for name in callback.surveyors}
        # Others that take part would miss the blocks.
        if found and all(isinstance(callback, PluginSurvey) for callback in asking) and known == found["found"].keys():
            return dict(found)
        self._run.record.pop("surveying", None)
        return {}

    def _survey_key(self) -> str | None:
        """What the survey depends on; None where that is not known."""
        asking = self._participants.surveying()
        surveyors = {
            name: plugin
            for callback in asking
            if isinstance(callback, PluginSurvey)
            for name, plugin in callback.surveyors.items()
        }
        options = self._run.config.get("pruning")
        if options is None or not all(isinstance(callback, PluginSurvey) for callback in asking):
            return None
        return survey_key(options, surveyors, any(plugin.survey_depends_on_method for plugin in surveyors.values()))

    def prune(self, part: Part) -> None:
        """Take the samples through the blocks at which they wait; those that an interrupted run finished stay."""
        weights = self._weights_of(part)
        rows = self._run.samples.rows if self._participants.gathers() else []
        done = [index - part.first for index in self._run.record.finished_blocks() if index in part.numbers]
        loop = self._loop(part, weights, rows, self._participants.needs, self._participants.gathers)
        written = None if loop.one_pass else self._written()
        loop.run(done, load_done=lambda place: weights.load_block(place, written))

    def _loop(
        self,
        part: Part,
        weights: Weights,
        rows: Sequence[SampleRow],
        needs: Callable[[], frozenset[str]],
        gathers: Callable[[], bool],
    ) -> BlockLoop:
        return BlockLoop(
            part,
            weights,
            rows,
            raise_hook=self._raise_hook,
            gathers=gathers,
            needs=needs,
            agree=self._run.processes.agree,
            placement=self._run.memory.placement,
            device=self._device,
            one_pass=self._participants.one_pass(),
            follows_dense=self._participants.follows_dense(),
            by_site=self._participants.by_site(),
        )

    def _weights_of(self, part: Part) -> Weights:
        weights = self._run.weights
        return weights if part.target == "language" else weights.of(part.runner.decoder)

    def _written(self) -> CheckpointFolder | None:
        """The checkpoint as far as it is pruned; None for a model in memory."""
        folder, output = self._model.folder, self._run.folder
        return None if folder is None or output is None else folder.at(output)
