"""What pruning cost: the model before and after, scored by an engine."""

from typing import TYPE_CHECKING

from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.demo import NAMES
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.output.folder import writing

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer


class RetentionEvaluation(PruneCallback):
    """Scores dense and pruned checkpoint after a run, puts both into the manifest, and prints the retention.

    Args:
        engine: What scores a checkpoint.
        dense: Scores of the dense checkpoint where they are known already.
    """

    def __init__(self, engine: Engine, dense: Scores | None = None) -> None:
        self.engine, self.dense = engine, dense

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Load both checkpoints as a user would, answer the questions, compare."""
        folder, device = trainer.run.folder, trainer.run.hardware.device
        if folder is None or "evaluation" in trainer.run.record:
            return
        assert pl_module.folder is not None
        dense = self.dense or self.engine.score(pl_module.folder.path, trainer.run.processes, device, "dense")
        pruned = self.engine.score(folder, trainer.run.processes, device, "pruned")
        trainer.run.record["evaluation"] = {
            "dense": dense.to_dict(),
            "pruned": pruned.to_dict(),
            "retention": retention(pruned, dense).to_dict(),
        }
        if trainer.run.processes.is_main:
            with writing(folder):
                trainer.run.record.write(folder)
        trainer.run.say(retention_table(dense, pruned))


class EmbeddedEvaluation(RetentionEvaluation):
    """Scores the embedded model (`model.path: demo` or `demo-outliers`) on the embedded benchmark.

    Other models are not scored: the benchmark asks about the embedded model's own world.
    """

    def __init__(self) -> None:
        super().__init__(BuiltinEngine())

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Score the embedded model, unless the user does not want it."""
        if trainer.run.options.evaluate and pl_module.path in NAMES:
            super().on_prune_end(trainer, pl_module)


def retention_table(dense: Scores, pruned: Scores) -> str:
    """Accuracy and retention in percent, one row per group of tasks."""
    kept = retention(pruned, dense)
    lines = [f"{'':24}{'dense':>8}{'pruned':>9}{'retained':>11}"]
    for group, score in dense.groups.items():
        tasks = list(dense.task_groups.values()).count(group)
        lines.append(_table_row(f"{group} ({tasks} tasks)", score, pruned.groups[group], kept.groups[group]))
    return "\n".join([*lines, _table_row("average", dense.average, pruned.average, kept.average)])


def _table_row(name: str, dense: float, pruned: float, kept: float) -> str:
    return f"{name:24}{100 * dense:8.1f}{100 * pruned:9.1f}{100 * kept:10.1f}%"
