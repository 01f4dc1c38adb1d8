"""The callbacks of a run: which take part, and what they ask of the calibration samples together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback, ProgressBar

from lvlm_prune.callbacks import (
    BlockMetrics,
    BlockwisePruning,
    EmbeddedEvaluation,
    PluginSurvey,
    PruneProgressBar,
    PruningReport,
    RetentionEvaluation,
    SparseCheckpointWriter,
)
from lvlm_prune.memory.sizes import MemoryDemand
from lvlm_prune.module import LVLMModule


def with_defaults(callbacks: Sequence[Callback], progress_bar: ProgressBar | None) -> list[Callback]:
    """The user's callbacks, then survey, writer, progress bar, evaluation, metrics, report; each unless given.

    The survey comes before the writer, which keeps what was found.

    Args:
        callbacks: The trainer's.
        progress_bar: The one of these that the trainer uses; None: it is to show none.
    """
    given = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    # Only what is written and verified can be scored.
    evaluations = [callback for callback in given if isinstance(callback, RetentionEvaluation)]
    given = [callback for callback in given if callback not in evaluations]
    tail: list[Callback] = [SparseCheckpointWriter(), *(evaluations or [EmbeddedEvaluation()]), BlockMetrics()]
    tail.append(PruningReport())
    if isinstance(progress_bar, PruneProgressBar):
        tail.insert(1, progress_bar)
    elif progress_bar is not None:  # Lightning's default bar knows nothing of pruning
        tail.insert(1, PruneProgressBar())
    tail = [PluginSurvey(callback) for callback in given if isinstance(callback, BlockwisePruning)] + tail
    return given + [callback for callback in tail if not any(isinstance(one, type(callback)) for one in given)]


class Participants:
    """What callbacks ask for together; every answer holds for now, since it may be another one at the next block.

    Args:
        callbacks: Those that take part. Stock Lightning callbacks ask for nothing.

    Attributes:
        pruning: The callback that prunes; None where none does.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self.pruning = next((callback for callback in callbacks if isinstance(callback, BlockwisePruning)), None)

    def sections(self) -> dict[str, Any]:
        """Key of the command line's configuration -> the callback behind it."""
        return {} if self.pruning is None else {"pruning": self.pruning}

    def gathers(self) -> bool:
        """Whether a block's activations are wanted before it is pruned."""
        return any(getattr(callback, "wants_activations", False) for callback in self._callbacks)

    def survey_gathers(self) -> bool:
        """Whether activations of the dense model's blocks are wanted in the survey, before its samples pass on."""
        return any(getattr(callback, "wants_survey_activations", False) for callback in self.surveying())

    def surveying(self) -> list[Callback]:
        """Those that want a survey of the dense model."""
        return [callback for callback in self._callbacks if getattr(callback, "wants_survey", False)]

    def plugin_surveys(self) -> list[PluginSurvey]:
        """Those that survey on behalf of plugins."""
        return [callback for callback in self.surveying() if isinstance(callback, PluginSurvey)]

    def survey_lines(self, module: LVLMModule, samples: int) -> list[str]:
        """What the surveys of plugins will cost, a line each.

        Args:
            module: The opened model.
            samples: Number of calibration samples.
        """
        return [line for survey in self.plugin_surveys() for line in survey.plan_lines(module, samples)]

    def samples(self) -> bool:
        """Whether calibration samples are needed at all."""
        return self.gathers() or bool(self.surveying())

    def one_pass(self) -> bool:
        """Whether samples go on from the dense blocks, as they are before they are pruned."""
        return self.pruning is not None and self.pruning.calibrate_on == "dense"

    def by_site(self) -> bool:
        """Whether the sites of a block are calibrated one after the other."""
        return self.pruning is not None and self.pruning.sequential and self.pruning.wants_activations

    def follows_dense(self) -> bool:
        """Whether the samples go through the dense model too, beside the pruned one."""
        statistic = None if self.pruning is None else self.pruning.chosen_solver.statistic
        return statistic is not None and statistic.takes_dense

    def needs(self) -> frozenset[str]:
        """What is to be recorded of a forward, of `lvlm_prune.methods.tokens.NEEDS`."""
        return self._together("needs")

    def survey_needs(self) -> frozenset[str]:
        """What is to be recorded of a forward in the survey, of `lvlm_prune.methods.tokens.NEEDS`."""
        return self._together("survey_needs")

    def _together(self, name: str) -> frozenset[str]:
        return frozenset().union(*(getattr(callback, name, ()) for callback in self._callbacks))

    def visual(self) -> list[str]:
        """Modalities that count as visual tokens."""
        return ["image", "video"] if self.pruning is None else self.pruning.visual

    def method(self) -> MemoryDemand | None:
        """What takes memory of what is asked for; None where no callback prunes."""
        pruning = self.pruning
        if pruning is None:
            return None
        return MemoryDemand(
            pruning.pool if pruning.wants_activations else None,
            pruning.chosen_solver,
            self.needs(),
            bool(self.surveying()),
            tuple(plugin for survey in self.plugin_surveys() for plugin in survey.surveyors.values()),
            self.survey_needs(),
            pruning.prunes_experts,
            self.follows_dense(),
            self.by_site(),
        )
