"""Engines for tests."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.scores import Scores


class ShareLeft(Engine):
    """Scores a checkpoint by the share of its weights that is left: exact, and needs no forward.

    Args:
        files: Pattern of its weight files.
        questions: A file that stands for what is asked; empty for none.
    """

    def __init__(self, files: str = "*.safetensors", questions: str = "") -> None:
        self.files, self.questions = files, questions

    def fingerprint(self) -> str:
        """What stands in the file."""
        return Path(self.questions).read_text() if self.questions else ""

    def score(self, folder, processes=None, device="cpu", title=""):
        """One task per kind of projection."""
        left: dict[str, list[float]] = {}
        for file in sorted(Path(folder).glob(self.files)):
            for name, tensor in load_file(file).items():
                kind = name.split(".")[-2]
                if kind in ("q_proj", "down_proj"):
                    left.setdefault(kind, []).append((tensor != 0).to(torch.float64).mean().item())
        tasks = {kind: sum(shares) / len(shares) for kind, shares in left.items()}
        return Scores(tasks, dict.fromkeys(tasks, 1), {"q_proj": "vision", "down_proj": "text"})
