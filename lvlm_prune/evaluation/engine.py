"""The interface of an engine: what scores a checkpoint folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lvlm_prune.distributed.processes import Processes
from lvlm_prune.evaluation.scores import Scores

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule


@dataclass(frozen=True)
class Measurement:
    """What an engine says of a model and of the dense one.

    Args:
        scores: What the model scores, by task.
        baseline: What the dense model scores; None where it was not asked.
        more: What else was measured, as plain data for `evaluation.json`.
    """

    scores: Scores
    baseline: Scores | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Engine(ABC):
    """Scores checkpoint folders, the dense one and pruned ones alike. Subclass it and name the subclass in YAML.

    The constructor only keeps its arguments, as attributes of the same names.
    """

    def check(self) -> None:  # noqa: B027
        """Refuse what can be seen to be wrong before anything is loaded.

        Raises:
            ValueError: For example, a file is missing; the message begins with the argument in backticks.
        """

    def fingerprint(self) -> str:
        """Tells questions apart that come from elsewhere, as a file that may change; empty where none do."""
        return ""

    def task_names(self) -> Sequence[str]:
        """Names of the tasks that `score` will have scores of; empty where they are not known before it is asked."""
        return ()

    @abstractmethod
    def score(
        self,
        folder: Path,
        processes: Processes | None = None,
        device: torch.device | str = "cpu",
        title: str = "",
    ) -> Scores:
        """Scores of a checkpoint, the same on all processes.

        Args:
            folder: Folder of the checkpoint to score.
            processes: All processes of the run, each of which calls this method; default: this one alone.
            device: Where the model is put and runs.
            title: What is scored, for the progress bar.
        """

    def measure(
        self,
        model: LVLMModule,
        baseline: LVLMModule | None,
        processes: Processes,
        device: torch.device,
    ) -> Measurement:
        """All that `evaluate` tells of a checkpoint; one model is in memory at a time.

        Args:
            model: The checkpoint, opened, without weights.
            baseline: The dense one, opened as well.
            processes: All processes of the run, each of which calls this method.
            device: Where each model is put and runs.
        """
        assert model.folder is not None
        dense = None
        if baseline is not None:
            assert baseline.folder is not None
            dense = self.score(baseline.folder.path, processes, device, "baseline")
        return Measurement(self.score(model.folder.path, processes, device, "model"), dense)
