"""What each method costs on the embedded model: accuracy and retention by sparsity, time and forwards beside Wanda's.

    python benchmarks/retention.py --json benchmarks/retention.json --markdown
    python benchmarks/retention.py --cost --json benchmarks/retention.json --markdown     # time and forwards too
    python benchmarks/retention.py --json benchmarks/retention.json --recipes wanda atv --figure retention.png
    python benchmarks/retention.py --model demo-outliers --json OUT --markdown

Accuracy comes from `lvlm-prune sweep`, one recipe at a time, blocks in float32. Cost is that of surveying, gathering,
scoring, solving and propagating at 50% (or the recipe's N:M), in processor time, each recipe right after a run of Wanda
to compare with. Finished runs stand in the JSON file, and those of an interrupted sweep in its folder; neither is
repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_prune import load_pruning, prune
from lvlm_prune.checkpoints import CheckpointFolder, resolve
from lvlm_prune.data import CalibrationDataModule, EmbeddedSource
from lvlm_prune.demo import DEMO, NAMES
from lvlm_prune.errors import InputError
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark
from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.module import LVLMModule
from lvlm_prune.report.figures.style import save_png
from lvlm_prune.report.figures.sweeps import retention_curve
from lvlm_prune.runs.sweep.grid import PATTERN, SPARSITY
from lvlm_prune.trainer import LVLMTrainer

RECIPES = Path(__file__).parents[1] / "configs" / "prune"


def run_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every recipe at every target that it allows (N:M recipes at their own) and seed, what is finished left out."""
    engine = BuiltinEngine(EmbeddedBenchmark(options.images, options.text))
    if "dense" not in results:
        results["dense"] = engine.score(resolve(options.model)).to_dict()
    for recipe in options.recipes:
        for target in targets_of(recipe, options.targets):
            value: str | float = target if ":" in target else float(target)
            seeds = [
                seed for seed in seeds_of(recipe, options.seeds) if key(recipe, target, seed) not in results["runs"]
            ]
            if not seeds:
                continue
            trainer = LVLMTrainer(
                accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
            finished = trainer.sweep(
                LVLMModule(options.model, dtype="float32"),
                CalibrationDataModule(EmbeddedSource()),
                recipes=str(RECIPES / f"{recipe}.yaml"),
                grid={PATTERN if ":" in target else SPARSITY: value},
                seeds=seeds,
                engine=engine,
                output=str(options.folder),
            )
            for run in finished:
                name = key(recipe, target, run.point.seed or 0)
                results["runs"][name] = {
                    "seconds": run.record["seconds"],
                    "sparsity": run.record["sparsity"]["achieved"],
                    "scores": run.record["scores"],
                }
                print(f"{name}: {100 * run.kept.average:.1f}%", flush=True)
            write(options.json, results)


def key(recipe: str, target: str, seed: int) -> str:
    """Name of a run in the JSON file."""
    return f"{recipe} {target} {seed}"


def targets_of(recipe: str, targets: list[str]) -> list[str]:
    """Those of the targets that a recipe can be pruned to."""
    config = RECIPES / f"{recipe}.yaml"
    own = str(load_pruning(config).pattern)
    if ":" in own:
        return [own]
    allowed = []
    for target in targets:
        try:
            load_pruning(config, **({"pattern": target} if ":" in target else {"sparsity": float(target)}))
        except InputError:  # this allocation or scorer has no N:M
            continue
        allowed.append(target)
    return allowed


def seeds_of(recipe: str, count: int) -> list[int]:
    """Calibration seeds; one where no data are used."""
    return list(range(count if load_pruning(RECIPES / f"{recipe}.yaml").wants_activations else 1))


def measure_cost(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Time and forwards of each recipe beside Wanda's, what is known left out."""
    folder = resolve(options.model)
    processor = AutoProcessor.from_pretrained(folder)
    Stopwatch.clock = staticmethod(time.process_time)

    def cost(recipe: str) -> dict[str, float]:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        data = CalibrationDataModule(EmbeddedSource())
        manifest = prune(model, data, load_pruning(RECIPES / f"{recipe}.yaml"), processor=processor)
        found = manifest.cost()
        visits = manifest["calibration"].get("num_samples", 1) * len(manifest["blocks"])
        return {"seconds": found["seconds"], "forwards_per_sample_and_block": found["block_forwards"] / visits}

    costs = results.setdefault("cost", {})
    if any(recipe not in costs for recipe in options.recipes):
        cost("wanda")  # warms up
    for recipe in options.recipes:
        if recipe not in costs:
            beside, found = cost("wanda"), cost(recipe)
            costs[recipe] = found | {"ratio_to_wanda": found["seconds"] / beside["seconds"]}
            write(options.json, results)
            print(f"{recipe}: {found['seconds']:.2f} s, {costs[recipe]['ratio_to_wanda']:.2f} x Wanda", flush=True)


def write(path: Path, results: dict[str, Any]) -> None:
    """Keep what is known."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any], group: str | None = None) -> str:
    """Retention in percent, mean and spread (standard deviation) over seeds, and cost, as a Markdown table."""
    dense, costs = Scores.from_dict(results["dense"]), results.get("cost", {})
    cells: dict[tuple[str, str], list[float]] = {}
    for name, run in results["runs"].items():
        recipe, target, _ = name.split()
        kept = retention(Scores.from_dict(run["scores"]), dense)
        cells.setdefault((recipe, target), []).append(100 * (kept.groups[group] if group else kept.average))
    recipes = list(dict.fromkeys(recipe for recipe, _ in cells))
    targets = sorted({target for _, target in cells}, key=lambda target: (":" in target, target))
    heads = ["method", *(target if ":" in target else f"{100 * float(target):g}%" for target in targets)]
    heads += ["s", "s, relative to Wanda", "forwards"] if costs and not group else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for recipe in recipes:
        row = [recipe]
        for target in targets:
            values = cells.get((recipe, target), [])
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        if costs and not group:
            found = costs.get(recipe)
            row += (
                ["", "", ""]
                if found is None
                else [
                    f"{found['seconds']:.1f}",
                    f"{found['ratio_to_wanda']:.2f}",
                    f"{found['forwards_per_sample_and_block']:.2f}",
                ]
            )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def lines(results: dict[str, Any], recipes: list[str]) -> dict[str, dict[float, list[float]]]:
    """Recipe -> sparsity in percent -> retention of each seed, as `retention_curve` takes them; N:M is left out."""
    dense = Scores.from_dict(results["dense"])
    found: dict[str, dict[float, list[float]]] = {recipe: {} for recipe in recipes}
    for name, run in results["runs"].items():
        recipe, target, _ = name.split()
        if recipe in found and ":" not in target:
            kept = retention(Scores.from_dict(run["scores"]), dense)
            found[recipe].setdefault(100 * float(target), []).append(kept.average)
    return {recipe: points for recipe, points in found.items() if points}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/retention.json"), help="results, kept up to date")
    parser.add_argument("--model", choices=NAMES, default=DEMO, help="the embedded model, or with outlier channels")
    parser.add_argument("--recipes", nargs="+", default=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.6", "0.7", "2:4"], help="sparsities and patterns")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--images", type=int, default=300, help="images of the benchmark")
    parser.add_argument("--text", type=int, default=600, help="text questions of the benchmark")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("runs/retention"), help="folder of the sweep")
    parser.add_argument("--cost", action="store_true", help="measure time and forwards of recipes that lack them")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--figure", type=Path, help="draw retention against sparsity, one line per recipe, as PNG")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = {
        "model": CheckpointFolder(resolve(options.model)).fingerprint(),
        "benchmark": {"num_images": options.images, "num_text": options.text},
    }
    results = json.loads(options.json.read_text()) if options.json.is_file() else setting | {"runs": {}}
    for name, value in setting.items():
        if results.get(name) != value:
            found = results.get(name)
            raise SystemExit(f"{options.json} was made with {name} {found}, not {value}; write to another file")
    run_all(options, results)
    if options.cost:
        measure_cost(options, results)
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
