"""The survey of the dense model on behalf of the plugins of `BlockwisePruning`: allocation and pool.

on_survey_block_start     plugins may evaluate losses with changed weights
on_survey_calibration_batch_end, on_survey_block_calibrated      statistics as the method will take them, where wanted
on_survey_block_changes   plugins may evaluate losses with changed weights, knowing the statistics
on_survey_batch_end       plugins see each sample once at each block
on_survey_block_end       sums over processes
on_survey_end             findings -> manifest -> plugins -> sparsity of each Linear
on_survey_restored                 manifest -> plugins -> sparsity of each Linear
"""

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.callbacks.pruning import BlockwisePruning
from lvlm_prune.loop import Block
from lvlm_prune.loop.activations import Activations
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.methods.contract import name_of, only_looks, tensors_of
from lvlm_prune.methods.survey import SurveyCost, Surveyor, surveyed_samples
from lvlm_prune.output.progress import readable_time
from lvlm_prune.output.units import readable_percent
from lvlm_prune.plugins import plugin_class
from lvlm_prune.pruning.calibration import BlockCalibration
from lvlm_prune.pruning.faults import faults_end_the_run

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer


class PluginSurvey(PruneCallback):
    """Shows the dense model to those plugins of a pruning callback that want to see it; without any it does nothing.

    Args:
        pruning: The callback whose allocation and pool may want a survey.
    """

    def __init__(self, pruning: BlockwisePruning) -> None:
        self.pruning = pruning
        self._calibration: BlockCalibration | None = None

    @property
    def surveyors(self) -> dict[str, Surveyor]:
        """Option of each plugin that wants a survey -> the plugin."""
        plugins = {"allocation": self.pruning.allocation, "pool": self.pruning.pool}
        return {
            name: plugin for name, plugin in plugins.items() if isinstance(plugin, Surveyor) and plugin.wants_survey
        }

    @property
    def wants_survey(self) -> bool:  # type: ignore[override]
        """True where a plugin wants one."""
        return bool(self.surveyors)

    @property
    def survey_needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the plugins need together, and the method's pool where they want statistics."""
        own = self.pruning.pool.needs if self.wants_survey_activations else frozenset()
        return own.union(*(plugin.survey_needs for plugin in self.surveyors.values()))

    @property
    def survey_samples(self) -> int | None:  # type: ignore[override]
        """Number of samples that the most demanding plugin takes; None for all."""
        counts = [plugin.survey_samples for plugin in self.surveyors.values()]
        return None if None in counts else max((count for count in counts if count is not None), default=0)

    def plan_lines(self, pl_module: "LVLMModule", samples: int) -> list[str]:
        """What the survey of each plugin will cost, a line each; the Linears are known, no weight is read.

        Args:
            pl_module: The opened model.
            samples: Number of calibration samples.
        """
        linears, lines = self._linears_of_blocks(pl_module), []
        for name, plugin in self.surveyors.items():
            count = len(surveyed_samples(plugin.survey_samples, range(samples)))
            takes = f"{count} samples, {_with_own_pass(plugin.survey_cost(linears, count), count, len(linears))}"
            decides = "; it decides the sparsity of each Linear, and what stands below is the mean"
            line = f"survey first, for {plugin_class(plugin).__name__}: {takes}"
            lines.append(line + (decides if name == "allocation" else ""))
        return lines

    def on_survey_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Draw the samples of each plugin."""
        numbers = trainer.run.samples.numbers
        self._samples = {
            name: surveyed_samples(plugin.survey_samples, numbers) for name, plugin in self.surveyors.items()
        }
        self._clock = Stopwatch(trainer.strategy.root_device)
        done = trainer.run.record.get("surveying", {})
        self._first = done.get("blocks", 0)
        for name, found in done.get("found", {}).items():
            self.surveyors[name].continue_survey(found)

    def on_survey_block_start(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, tail: RemainingDecoderBlocks
    ) -> None:
        """Let the plugins try changed weights; before the first block that is left, let them say what that costs."""
        for name, plugin in self.surveyors.items():
            own = tail.of_samples(self._samples[name])
            if plugin.wants_survey_losses and block.place == self._first:
                left = dict(islice(self._linears_of_blocks(pl_module).items(), block.place, None))
                cost = _with_own_pass(plugin.survey_cost(left, own.num_samples), own.num_samples, len(left))
                takes = readable_time(cost.seconds(*own.seconds()))
                trainer.run.say(f"survey for {plugin_class(plugin).__name__}: {cost} per process, about {takes}")
            plugin.survey_block_start(block.name, self._linears(block), own)

    @property
    def wants_survey_activations(self) -> bool:  # type: ignore[override]
        """True where a plugin wants statistics, and the method's solver has any."""
        wanted = any(plugin.wants_survey_statistics for plugin in self.surveyors.values())
        return wanted and self.pruning.wants_activations

    @faults_end_the_run()
    def on_survey_calibration_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """Sum up what the method's pool takes of each sample."""
        pool = self.pruning.pool
        tokens = sample.tokens(self.pruning.visual, pool.needs, asked_by=plugin_class(pool).__name__)
        self._calibration_of(block).add(sample, tokens)

    @faults_end_the_run()
    def on_survey_block_calibrated(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Add up the statistics of the block over all processes."""
        devices = {name: linear.weight.device for name, linear in block.linears.items()}
        self._calibration_of(block).finish(trainer.run.processes, devices)

    def _calibration_of(self, block: Block) -> BlockCalibration:
        """Statistics of the block, fresh ones when its first sample comes."""
        if self._calibration is None or self._calibration.block != block.index:
            statistic = self.pruning.chosen_solver.statistic
            assert statistic is not None
            names = {name: f"{block.name}.{name}" for name in self._linears(block)}
            self._calibration = BlockCalibration(
                block.index, names, self.pruning.pool, statistic, record=False, visual=self.pruning.visual
            )
        return self._calibration

    def on_survey_block_changes(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, tail: RemainingDecoderBlocks
    ) -> None:
        """Let the plugins try changed weights, with statistics where the method has any."""
        linears = self._linears(block)
        calibration = self._calibration if self.wants_survey_activations else None
        statistics = {name: None if calibration is None else calibration.statistic_of(name) for name in linears}
        for name, plugin in self.surveyors.items():
            if plugin.wants_survey_statistics:
                plugin.survey_block_changes(block.name, linears, statistics, tail.of_samples(self._samples[name]))
        self._calibration = None

    def on_survey_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """Show the sample to each plugin that takes it."""
        linears = self._linears(block)
        inputs: dict[str, Tensor] = {}
        for site in sample.site_inputs():
            for name in sample.sites[site.name]:
                if name in linears:
                    inputs[name] = torch.cat([inputs[name], site.inputs]) if name in inputs else site.inputs
        for option, plugin in self.surveyors.items():
            if sample.sample not in self._samples[option]:
                continue
            tokens = sample.tokens(self.pruning.visual, plugin.survey_needs, asked_by=plugin_class(plugin).__name__)
            with only_looks(f"{name_of(plugin)}.survey_sample", inputs=inputs.values(), **tensors_of(tokens)):
                plugin.survey_sample(block.name, tokens, inputs)

    def on_survey_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Let the plugins sum over processes, and note what an interrupted run can go on from."""
        for plugin in self.surveyors.values():
            plugin.survey_block_end(block.name, self._linears(block), trainer.run.processes.sum)
        found = {name: plugin.survey_so_far() for name, plugin in self.surveyors.items()}
        if None in found.values():
            return
        forwards = trainer.run.processes.sum(torch.tensor([block.forwards], dtype=torch.float64))
        before = trainer.run.record.get("surveying", {})
        trainer.run.record["surveying"] = {
            "blocks": block.place + 1,
            "block_forwards": before.get("block_forwards", 0) + int(forwards.item()),
            "seconds": before.get("seconds", 0.0) + self._clock.lap(),
            "found": found,
        }

    def on_survey_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Keep what the plugins found, and deal out the sparsity."""
        for name, plugin in self.surveyors.items():
            trainer.run.record["survey"][name] = plugin.survey_end(trainer.run.processes.sum)
        self.on_survey_restored(trainer, pl_module)

    def on_survey_restored(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Give each plugin what it found, and deal out the sparsity."""
        for name, plugin in self.surveyors.items():
            plugin.use_survey(trainer.run.record["survey"][name])
        self.pruning.allocate()
        targets = self.pruning.targets.values()
        if min(targets) < max(targets):
            least, most = readable_percent(min(targets)), readable_percent(max(targets))
            trainer.run.say(f"surveyed: sparsity {least} to {most} per Linear")

    def _linears(self, block: Block) -> dict[str, nn.Linear]:
        """Linears of the block that are going to be pruned."""
        return {name: linear for name, linear in block.linears.items() if f"{block.name}.{name}" in self.pruning.shapes}

    def _linears_of_blocks(self, pl_module: "LVLMModule") -> dict[str, list[str]]:
        names = [pl_module.runner.name(index) for index in range(len(pl_module.runner))]
        return {
            block: [name.removeprefix(f"{block}.") for name in self.pruning.shapes if name.startswith(f"{block}.")]
            for block in names
        }


def _with_own_pass(cost: SurveyCost, samples: int, blocks: int) -> SurveyCost:
    """With the forward of each sample through each block that every survey makes, as the record counts it.

    Example:
        >>> print(_with_own_pass(SurveyCost(280), samples=2, blocks=4))
        288 block forwards
    """
    return SurveyCost(cost.block_forwards + samples * blocks, cost.losses)
