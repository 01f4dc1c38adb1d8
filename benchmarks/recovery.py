"""What recovery gives back on the embedded model: dense, pruned, recovered; mean of several seeds.

    python benchmarks/recovery.py --seeds 3 --markdown
    python benchmarks/recovery.py --bases 2:4 --recipes lora blockwise     # a part; the rest can follow

The embedded model is pruned by ATV to 70% and to 2:4, and by `best` to 70%, 80% and 2:4. Each is recovered by every
recipe on questions of the training split, and, for comparison, by `lora` on captions alone in equally many steps.
Training never sees the test split that is scored. Finished runs stand in the JSON file and are not repeated.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main as run_command
from lvlm_prune.demo import CHECKPOINT

RECIPES = Path(__file__).parents[1] / "configs" / "recover"
_ATV = "--method=atv"
_BEST = "--method=best"
BASES = {
    "70%": [_ATV, "--pruning.sparsity=0.7"],
    "2:4": [_ATV, "--pruning.pattern=2:4"],
    "best 70%": [_BEST, "--pruning.sparsity=0.7"],
    "best 80%": [_BEST, "--pruning.sparsity=0.8"],
    "best 2:4": [_BEST, "--pruning.pattern=2:4"],
}
CAPTIONS = "lora on captions"
# A quarter as many captions as questions, so four times: equally many steps.
_CAPTION_OPTIONS = ["--data.source=EmbeddedSource", "--trainer.max_epochs=4"]


def run(*arguments: str) -> None:
    """A command, in this process.

    Raises:
        RuntimeError: It did not end well.
    """
    if run_command(arguments) != 0:
        raise RuntimeError(f"failed: lvlm-prune {' '.join(arguments)}")


def folder_name(*parts: object) -> str:
    """For example `70-lora-0`."""
    return "-".join(map(str, parts)).replace("%", "").replace(":", "of").replace(" ", "-")


def pruned_base(base: str, runs: Path, dtype: str) -> Path:
    """The pruned embedded model; made only if it is not there yet."""
    folder = runs / folder_name("base", base)
    if not (folder / "config.json").is_file():
        run("prune", *BASES[base], "--resume=false", f"--model.dtype={dtype}", f"--output={folder}")
    return folder


def recover(base: str, recipe: str, seed: int, samples: int | None, runs: Path, dtype: str) -> dict[str, Any]:
    """One recovery: scores of the dense, the pruned and the recovered model, and what it cost."""
    captions = recipe == CAPTIONS
    config = RECIPES / f"{'lora' if captions else recipe}.yaml"
    output = runs / folder_name(base, recipe, seed)
    if not (output / "config.json").is_file():
        arguments = [f"--config={config}", f"--model.path={pruned_base(base, runs, dtype)}", f"--output={output}"]
        arguments += [f"--model.dtype={dtype}", f"--data.seed={seed}", "--trainer.enable_progress_bar=false"]
        arguments += [f"--resume={str((output / 'recovery.json').is_file()).lower()}"]
        arguments += [] if recipe == "full" else [f"--lora.seed={seed}"]
        arguments += _CAPTION_OPTIONS if captions else []
        arguments += [] if samples is None else [f"--data.num_samples={samples}"]
        run("recover", *arguments)
    record = json.loads((output / "recovery.json").read_text())
    evaluation = {name: record["evaluation"][name] for name in ("dense", "pruned", "recovered")}
    minutes = (record["seconds"] - record["evaluation_seconds"]) / 60
    steps, sparsity = record["training"]["steps"], record["verified"]["sparsity"]
    return {"minutes": minutes, "steps": steps, "sparsity": sparsity} | evaluation


def run_all(
    bases: Sequence[str], recipes: Sequence[str], seeds: int, samples: int | None, runs: Path, path: Path, dtype: str
) -> dict[str, Any]:
    """Every recipe on every base with every seed; goes on where the file ends."""
    setting = {"model": CheckpointFolder(CHECKPOINT).fingerprint(), "samples": samples}
    results = json.loads(path.read_text()) if path.is_file() else setting | {"runs": {}}
    if {name: results[name] for name in setting} != setting:
        raise SystemExit(f"{path} was made with another embedded model or number of samples; write to another file")
    results |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    for seed in range(seeds):
        for base in bases:
            for recipe in recipes:
                key = f"{base} | {recipe} | {seed}"
                if key not in results["runs"]:
                    found = recover(base, recipe, seed, samples, runs, dtype)
                    results["runs"][key] = found if dtype == "auto" else found | {"dtype": dtype}
                    path.write_text(json.dumps(results, indent=1) + "\n")
                    print(f"{key}: {100 * regained(results['runs'][key]):.0f}% regained", flush=True)
    return results


def regained(found: dict[str, Any]) -> float:
    """Share of the lost average accuracy that came back."""
    dense, pruned, recovered = (found[name]["average"] for name in ("dense", "pruned", "recovered"))
    return (recovered - pruned) / (dense - pruned)


def table(results: dict[str, Any]) -> str:
    """Accuracy and share of the lost accuracy in percent, mean and standard deviation over seeds, as Markdown."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, found in results["runs"].items():
        base, recipe, _ = key.split(" | ")
        groups.setdefault((base, recipe), []).append(found)
    lines = ["| pruned to | recovered by | dense | pruned | recovered | regained | minutes |", "|---" * 7 + "|"]
    for base, recipe in sorted(groups):
        runs = groups[base, recipe]
        cells = [
            f"{100 * statistics.mean(found[name]['average'] for found in runs):.1f}"
            for name in ("dense", "pruned", "recovered")
        ]
        shares = [100 * regained(found) for found in runs]
        spread = f" ± {statistics.stdev(shares):.0f}" if len(shares) > 1 else ""
        cells += [f"{statistics.mean(shares):.0f}%{spread}", f"{statistics.mean(run['minutes'] for run in runs):.1f}"]
        lines.append(f"| {base} | {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    recipes = [*sorted(path.stem for path in RECIPES.glob("*.yaml")), CAPTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/recovery.json"), help="results, kept up to date")
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"), help="where the checkpoints go")
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="samples to train and validate on; default: all there are")
    parser.add_argument("--dtype", default="auto", help="float32 where products of bfloat16 are slow")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    given = parser.parse_args(arguments)
    results = run_all(given.bases, given.recipes, given.seeds, given.samples, given.runs, given.json, given.dtype)
    if given.markdown:
        print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
