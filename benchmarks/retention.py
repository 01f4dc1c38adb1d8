"""What each method costs on the embedded model: accuracy and retention by sparsity, over calibration seeds.

    python benchmarks/retention.py --json benchmarks/retention.json --markdown
    python benchmarks/retention.py --json benchmarks/retention.json --recipes wanda atv --figure retention.png

Every run is the loop of `lvlm-prune prune` on the model in memory (float32), then the embedded benchmark. Finished runs
stand in the JSON file and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_prune import load_pruning, prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.data import CalibrationDataModule, EmbeddedSource
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.demo.benchmark import EmbeddedBenchmark
from lvlm_prune.errors import InputError
from lvlm_prune.evaluation.answers import score
from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.figures.style import save_png
from lvlm_prune.figures.sweeps import retention_curve

RECIPES = Path(__file__).parents[1] / "configs" / "prune"


def dense_model() -> torch.nn.Module:
    """The embedded model in float32."""
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def measure(pruning: BlockwisePruning, seed: int, processor, questions) -> dict:
    """Prune with one calibration seed and score."""
    model = dense_model()
    data = CalibrationDataModule(EmbeddedSource(), seed=seed)
    started = time.perf_counter()
    manifest = prune(model, data, pruning, processor=processor)
    return {
        "seconds": time.perf_counter() - started,
        "sparsity": manifest["sparsity"]["achieved"],
        "scores": score(model, processor, questions).to_dict(),
        "visual_tokens": [
            sum(block["visual_tokens"]) / len(block["visual_tokens"])
            for block in manifest["blocks"]
            if "visual_tokens" in block
        ],
    }


def run_all(recipes: list[str], targets: list[str], seeds: int, size: dict[str, int], path: Path) -> dict:
    """Every recipe at every target that it allows (N:M recipes at their own) and seed; goes on where the file ends."""
    results = json.loads(path.read_text()) if path.is_file() else {"benchmark": size, "runs": {}}
    if results["benchmark"] != size:
        raise SystemExit(f"{path} was made with {results['benchmark']}, not {size}; write to another file")
    processor, questions = AutoProcessor.from_pretrained(CHECKPOINT), EmbeddedBenchmark(**size).questions
    if "dense" not in results:
        results["dense"] = score(dense_model(), processor, questions).to_dict()
    for recipe in recipes:
        config = RECIPES / f"{recipe}.yaml"
        pattern = str(load_pruning(config).pattern)
        for target in [pattern] if ":" in pattern else targets:
            options = {"pattern": target} if ":" in target else {"sparsity": float(target)}
            for seed in range(seeds):
                key = f"{recipe} {target} {seed}"
                if key in results["runs"]:
                    continue
                try:
                    pruning = load_pruning(config, **options)
                except InputError:  # this allocation or scorer has no N:M
                    break
                if not pruning.wants_activations and seed:  # no data, so no seed
                    continue
                results["runs"][key] = measure(pruning, seed, processor, questions)
                path.write_text(json.dumps(results, indent=1) + "\n")
                kept = retention(Scores.from_dict(results["runs"][key]["scores"]), Scores.from_dict(results["dense"]))
                print(f"{key}: {100 * kept.average:.1f}%", flush=True)
    return results


def table(results: dict, group: str | None = None) -> str:
    """Retention in percent, mean and spread (standard deviation) over seeds, as a Markdown table."""
    dense = Scores.from_dict(results["dense"])
    cells: dict[tuple[str, str], list[float]] = {}
    for key, run in results["runs"].items():
        recipe, target, _ = key.split()
        kept = retention(Scores.from_dict(run["scores"]), dense)
        cells.setdefault((recipe, target), []).append(100 * (kept.groups[group] if group else kept.average))
    recipes = list(dict.fromkeys(recipe for recipe, _ in cells))
    targets = sorted({target for _, target in cells}, key=lambda target: (":" in target, target))
    heads = [target if ":" in target else f"{100 * float(target):g}%" for target in targets]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(targets) + 1) + "|"]
    for recipe in recipes:
        row = []
        for target in targets:
            values = cells.get((recipe, target), [])
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {recipe} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def lines(results: dict, recipes: list[str]) -> dict[str, dict[float, list[float]]]:
    """Recipe -> sparsity in percent -> retention of each seed, as `retention_curve` takes them; N:M is left out."""
    dense = Scores.from_dict(results["dense"])
    found: dict[str, dict[float, list[float]]] = {recipe: {} for recipe in recipes}
    for key, run in results["runs"].items():
        recipe, target, _ = key.split()
        if recipe in found and ":" not in target:
            kept = retention(Scores.from_dict(run["scores"]), dense)
            found[recipe].setdefault(100 * float(target), []).append(kept.average)
    return {recipe: points for recipe, points in found.items() if points}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/retention.json"), help="results, kept up to date")
    parser.add_argument("--recipes", nargs="+", default=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.6", "0.7", "2:4"], help="sparsities and patterns")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--images", type=int, default=300, help="images of the benchmark")
    parser.add_argument("--text", type=int, default=600, help="text questions of the benchmark")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--figure", type=Path, help="draw retention against sparsity, one line per recipe, as PNG")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = {"num_images": options.images, "num_text": options.text}
    results = run_all(options.recipes, options.targets, options.seeds, size, options.json)
    if options.figure is not None:
        save_png(retention_curve(lines(results, options.recipes), "sparsity (%)", height=3.4), options.figure)
    if options.markdown:
        dense = Scores.from_dict(results["dense"])
        print(
            f"\ndense accuracy {100 * dense.average:.1f}%: "
            + ", ".join(f"{k} {100 * v:.1f}%" for k, v in dense.groups.items())
        )
        for group in (None, *dense.groups):
            print(f"\nretained, {group or 'all'} tasks\n\n{table(results, group)}")


if __name__ == "__main__":
    main()
