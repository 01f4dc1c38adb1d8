"""What recovery gives back on the embedded model: dense, pruned, recovered; mean of several seeds.

    python benchmarks/recovery.py --seeds 3 --output runs/recovery

The embedded model is pruned by ATV to 70% and to 2:4. Each is recovered by every recipe on questions of the training
split, and, for comparison, by the first recipe on captions alone. Training never sees the test split that is scored.
Writes `recovery.md` (the table) and `recovery.json` (all scores) into the output folder.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from lvlm_prune.cli import main as run_command
from lvlm_prune.demo.benchmark import EmbeddedBenchmark

RECIPES = Path(__file__).parents[1] / "configs" / "recover"
BASES = {"70%": ["--pruning.sparsity=0.7"], "2:4": ["--pruning.pattern=2:4"]}


def run(*arguments: str) -> None:
    """A command, in this process.

    Raises:
        RuntimeError: It did not end well.
    """
    if run_command(arguments) != 0:
        raise RuntimeError(f"failed: lvlm-prune {' '.join(arguments)}")


def recover(base: Path, output: Path, recipe: str, seed: int, captions: bool) -> dict[str, Any]:
    """The record of one recovery, repeated only if it is not there yet."""
    if not (output / "recovery.json").is_file():
        arguments = [f"--config={RECIPES / recipe}", f"--model.path={base}", f"--output={output}"]
        arguments += [f"--data.seed={seed}", "--trainer.enable_progress_bar=false"]
        if recipe.startswith("lora"):
            arguments.append(f"--lora.seed={seed}")
        if captions:
            # A quarter as many as questions, so four times: equally many steps.
            arguments += ["--data.source=EmbeddedSource", "--trainer.max_epochs=4"]
        run("recover", *arguments)
    return json.loads((output / "recovery.json").read_text())


def row(label: str, records: list[dict[str, Any]]) -> str:
    """One line of the table: accuracy in percent and the share of the lost accuracy that came back."""
    cells = []
    for name in ("dense", "pruned", "recovered"):
        cells.append(f"{100 * statistics.mean(record['evaluation'][name]['average'] for record in records):.1f}")
    regained = [
        (scores["recovered"]["average"] - scores["pruned"]["average"])
        / (scores["dense"]["average"] - scores["pruned"]["average"])
        for record in records
        for scores in [record["evaluation"]]
    ]
    spread = f" ± {100 * statistics.stdev(regained):.0f}" if len(regained) > 1 else ""
    minutes = statistics.mean(record["training"]["seconds"] for record in records) / 60
    cells += [f"{100 * statistics.mean(regained):.0f}{spread}%", f"{minutes:.1f}"]
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/recovery"))
    options = parser.parse_args()
    started = time.perf_counter()
    recipes = sorted(path.name for path in RECIPES.glob("*.yaml"))
    lines = ["| Base and training | dense | pruned | recovered | regained | minutes |", "|---|---|---|---|---|---|"]
    found: dict[str, list[dict[str, Any]]] = {}
    for base_name, pruning in BASES.items():
        base = options.output / f"base-{base_name.replace(':', 'of').rstrip('%')}"
        if not (base / "config.json").is_file():
            run("prune", "--pruning.name=ATV", *pruning, f"--output={base}")
        trainings = [(recipe, False) for recipe in recipes] + [("lora.yaml", True)]
        for recipe, captions in trainings:
            label = f"{base_name}, {Path(recipe).stem}" + (", captions alone" if captions else "")
            found[label] = [
                recover(base, options.output / f"{label}-{seed}".replace(" ", ""), recipe, seed, captions)
                for seed in range(options.seeds)
            ]
            lines.append(row(label, found[label]))
            print(lines[-1], flush=True)
    evaluations = {label: [record["evaluation"] for record in records] for label, records in found.items()}
    (options.output / "recovery.json").write_text(json.dumps(evaluations, indent=1) + "\n")
    questions = len(EmbeddedBenchmark().questions)
    lines.append(f"\n{questions} questions, {options.seeds} seeds, {(time.perf_counter() - started) / 60:.0f} minutes")
    (options.output / "recovery.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
