"""The interface of an engine: what scores a checkpoint folder."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch

from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.processes import Processes


class Engine(ABC):
    """Scores checkpoint folders, the dense one and pruned ones alike. Subclass it and name the subclass in YAML.

    The constructor only keeps its arguments, as attributes of the same names.
    """

    def check(self) -> None:  # noqa: B027
        """Refuse what can be seen to be wrong before anything is loaded.

        Raises:
            InputError: For example, a file is missing.
        """

    @abstractmethod
    def score(
        self, folder: Path, processes: Processes | None = None, device: torch.device | str = "cpu", title: str = ""
    ) -> Scores:
        """Scores of a checkpoint, the same on all processes.

        Args:
            folder: The checkpoint folder.
            processes: All processes of the run, each of which calls this method; default: this one alone.
            device: Where the model goes.
            title: What is scored, for the progress bar.
        """
