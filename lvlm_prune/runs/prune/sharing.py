"""What runs on the same calibration set have in common, so that it is computed once for all of them.

run 1   catch ─► survey ─► blocks ...          the samples at the input of block 0, and what a survey of the dense model
run 2     └───────┴──────► blocks ...          found, are kept; they depend neither on sparsity nor on scorer
run 3                      blocks ...
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.distributed.launching import Launch
from lvlm_prune.errors import InputError
from lvlm_prune.loop.catching import CaughtSamples
from lvlm_prune.plugins import plugin_class

# Of the options of `BlockwisePruning`: what is done with a survey, and plugins, which count where they want one.
_NOT_SURVEYED = {"sparsity", "pattern", "pool", "scorer", "solver", "allocation", "record", "name", "calibrate_on"}
_OF_METHOD = {"sparsity", "pattern", "pool", "scorer", "solver"}


@dataclass
class SharedCalibration:
    """Kept by the first run of one model on one calibration set, taken by those after it; in memory.

    Args:
        launch: The processes of all runs.
        fingerprint: Of the samples of runs that an earlier command finished; None where there are none.
        samples: What was caught; None before the first run.
        surveys: Key of a survey -> its findings.
    """

    launch: Launch
    fingerprint: str | None = None
    samples: CaughtSamples | None = None
    surveys: dict[str, dict[str, Any]] = field(default_factory=dict)

    def expect(self, fingerprint: str | None, source: CalibrationSource) -> None:
        """Take notice of the samples that a finished run was calibrated on.

        Raises:
            InputError: They are others than those that were caught, or than those of another finished run.
        """
        if fingerprint is not None:
            self.refuse_other_samples(fingerprint, source)
            self.fingerprint = fingerprint
            if self.samples is not None:
                self.refuse_other_samples(self.samples.calibration["fingerprint"], source)

    def refuse_other_samples(self, fingerprint: str, source: CalibrationSource) -> None:
        """Refuse samples that are others than those of earlier runs: what came out could not be compared.

        Raises:
            InputError: What the source reads has changed.
        """
        if self.fingerprint not in (None, fingerprint):
            problem = "gives other calibration samples now than when the finished runs were made; write elsewhere"
            raise InputError("data.source", plugin_class(source).__name__, problem)

    def keep_survey(self, key: str, findings: Mapping[str, Any]) -> None:
        """Keep what a survey found."""
        self.surveys[key] = copy.deepcopy(dict(findings))

    def take_survey(self, key: str) -> dict[str, Any] | None:
        """What the survey of this key found; None before there was one."""
        return copy.deepcopy(self.surveys.get(key))


def survey_key(pruning: Mapping[str, Any], plugins: Iterable[str], of_method: bool) -> str:
    """What a survey of the dense model depends on, besides model and samples.

    Args:
        pruning: Options of `BlockwisePruning` as plain data.
        plugins: Which of them are plugins that want the survey.
        of_method: Whether what they find depends on how, and how much, is going to be pruned.
    """
    wanted = set(plugins) | (pruning.keys() - _NOT_SURVEYED) | (pruning.keys() & _OF_METHOD if of_method else set())
    return json.dumps({name: pruning[name] for name in sorted(wanted)}, sort_keys=True)
