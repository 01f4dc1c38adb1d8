"""Recovery of the embedded model: it is dense, so it is pruned first, and it is scored in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvlm_prune.checkpoints import resolve
from lvlm_prune.module import LVLMModule
from lvlm_prune.run import Run, RunTrainer, described_config

#: What it is pruned to.
DEMO_SPARSITY = 0.7


def prune_embedded(trainer: RunTrainer, run: Run, name: str) -> Path:
    """Prune the embedded model of this name by ATV into a folder beside the run's own; the folder."""
    from lvlm_prune.callbacks import BlockwisePruning
    from lvlm_prune.data import CalibrationDataModule
    from lvlm_prune.runs.prune.run import PruneRun

    model, data = LVLMModule(name), CalibrationDataModule()
    pruning = BlockwisePruning(sparsity=DEMO_SPARSITY, name="ATV")
    pruner = PruneRun(
        trainer,
        model,
        data,
        output="",
        options=replace(run.options, resume=False),
        callbacks=[pruning],
        config=described_config(model, data, pruning=pruning),
        hardware=run.hardware.alone(),
    )
    pruner()
    assert pruner.run.folder is not None
    return pruner.run.folder


def scored_beside_dense(name: str, pruned: Path, recovered: Path, base_record: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the embedded model dense, pruned and recovered, and what the latter two retain.

    Args:
        name: Of the dense model.
        pruned: Folder of the pruned model.
        recovered: Folder of the recovered one.
        base_record: What is recorded of the pruned one; scores in it are not made again.
    """
    from lvlm_prune.evaluation.builtin import BuiltinEngine
    from lvlm_prune.evaluation.scores import Scores, retention

    earlier = base_record.get("evaluation", {})
    folders = {"dense": resolve(name), "pruned": pruned, "recovered": recovered}
    known = {"dense": earlier.get("dense"), "pruned": earlier.get("recovered", earlier.get("pruned"))}
    scores = {
        name: Scores.from_dict(saved) if (saved := known.get(name)) else BuiltinEngine().score(folder, title=name)
        for name, folder in folders.items()
    }
    kept = {name: retention(scores[name], scores["dense"]).to_dict() for name in ("pruned", "recovered")}
    return {name: found.to_dict() for name, found in scores.items()} | {"retention": kept}
