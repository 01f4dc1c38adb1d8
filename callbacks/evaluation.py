"""What pruning cost: the embedded model before and after, on the embedded benchmark."""

from typing import TYPE_CHECKING

import torch

from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.output_folder import writing

if TYPE_CHECKING:
    from lvlm_prune.evaluation.scores import Scores
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer


class EmbeddedEvaluation(PruneCallback):
    """Scores dense and pruned model after a run on the embedded model (`model.path: demo`), and prints the retention.

    Other models are not scored: the benchmark asks about the embedded model's own world.
    """

    def on_prune_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """Load both checkpoints as a user would, answer the questions, compare."""
        folder = trainer.output_folder
        if not (trainer.evaluate_run and pl_module.path == "demo" and folder is not None and trainer.processes.is_main):
            return
        if "evaluation" in trainer.manifest:
            return
        from lvlm_prune.evaluation.scores import retention

        assert pl_module.folder is not None
        dense, pruned = (score_checkpoint(str(path)) for path in (pl_module.folder.path, folder))
        kept = retention(pruned, dense)
        trainer.manifest["evaluation"] = {
            "dense": dense.to_dict(),
            "pruned": pruned.to_dict(),
            "retention": kept.to_dict(),
        }
        with writing(folder):
            trainer.manifest.write(folder)
        trainer.say(retention_table(dense, pruned))


def score_checkpoint(path: str) -> "Scores":
    """Exact match of a checkpoint folder on the embedded benchmark, in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from lvlm_prune.demo.benchmark import EmbeddedBenchmark
    from lvlm_prune.evaluation.exact_match import score

    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return score(model, AutoProcessor.from_pretrained(path), EmbeddedBenchmark().questions)


def retention_table(dense: "Scores", pruned: "Scores") -> str:
    """Accuracy and retention in percent, one row per group of tasks."""
    from lvlm_prune.evaluation.scores import retention

    kept = retention(pruned, dense)
    lines = [f"{'':24}{'dense':>8}{'pruned':>9}{'retained':>11}"]
    for group, score in dense.groups.items():
        tasks = list(dense.task_groups.values()).count(group)
        lines.append(_table_row(f"{group} ({tasks} tasks)", score, pruned.groups[group], kept.groups[group]))
    return "\n".join([*lines, _table_row("average", dense.average, pruned.average, kept.average)])


def _table_row(name: str, dense: float, pruned: float, kept: float) -> str:
    return f"{name:24}{100 * dense:8.1f}{100 * pruned:9.1f}{100 * kept:10.1f}%"
