"""What a recovery says when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import RECOVERY_RECORD


def summary(record: Manifest, folder: Path) -> str:
    """What a recovery did, in about a hundred words."""
    training, verified = record["training"], record["verified"]
    how = {"lora": "LoRA", "full": "full fine-tuning", "blockwise": "block-wise reconstruction"}[record["method"]]
    if "teacher" in record:
        how += " with distillation"
    losses = [
        f"{name.replace('_', ' ')} {training[name]:.3f}"
        for name in ("train_loss", "validation_loss", "error_before", "error_after")
        if training.get(name) is not None
    ]
    lines = [
        f"recovered by {how}: {training['trainable_parameters'] / 1e6:.2f} M trainable parameters · "
        f"{training['steps']} steps in {training['seconds']:.0f} s · {' · '.join(losses)}",
        f"verified: sparsity {verified['sparsity']:.4g} ({record['pattern']}), every pruned weight +0.0 in "
        f"{len(record['linears'])} Linears, {verified['untouched_tensors']} other tensors untouched",
    ]
    if "evaluation" in record:
        lines.append(_scores_table(record["evaluation"]))
    written = "merged checkpoint" + (" · adapter/" if (folder / "adapter").is_dir() else "")
    return "\n".join([*lines, f"wrote {folder} ({written} · {RECOVERY_RECORD}) · {record['seconds']:.0f} s"])


def _scores_table(evaluation: dict[str, Any]) -> str:
    kept = evaluation["retention"]
    lines = [f"{'':16}{'dense':>8}{'pruned':>9}{'recovered':>11}{'retained':>20}"]
    rows = {group: ("groups", group) for group in evaluation["dense"]["groups"]} | {"average": ("average", "")}
    for label, (kind, group) in rows.items():
        values = [
            scores[kind][group] if group else scores[kind]
            for scores in (
                evaluation["dense"],
                evaluation["pruned"],
                evaluation["recovered"],
                kept["pruned"],
                kept["recovered"],
            )
        ]
        dense, pruned, recovered, before, after = (100 * value for value in values)
        lines.append(f"{label:16}{dense:8.1f}{pruned:9.1f}{recovered:11.1f}{before:11.1f}% → {after:.1f}%")
    return "\n".join(lines)
