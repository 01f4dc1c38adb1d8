"""How the options of `best` are chosen: each changed by itself, on questions that no table is made of.

    OMP_NUM_THREADS=1 python -m benchmarks.choices --json benchmarks/choices.json --markdown

The embedded model is pruned in float32 and asked questions of the *validation* split (the tables ask those of the test
split), with calibration seeds that the tables do not use. Finished runs stand in the JSON file and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.recovery import run
from benchmarks.retention import write
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark
from lvlm_prune.evaluation.scores import Scores, retention
from lvlm_prune.methods.solvers import ALPSSolver, Solver
from lvlm_prune.output.markdown import markdown_table

SEEDS = (10, 11)
"""Calibration seeds; those of the tables begin at 0."""

BASE = ["--method=best", "--pruning.allocation.width=0.15"]
"""What each choice changes one option of: `best` as it was when they were made, its width named."""

FIXED = ["--model.dtype=float32", "--evaluate=false", "--report=false", "--trainer.enable_progress_bar=false"]


class SurveyedByALPS(ALPSSolver):
    """ALPS that surveys with a few iterations of its own instead of with SparseGPT."""

    def quick(self) -> Solver:
        """Six iterations."""
        return ALPSSolver(iterations=6, damping=self.damping)


_WIDER = ["--pruning.allocation.width=0.25"]
_BLOCKS = ["--pruning.allocation.groups=block", *_WIDER]


def _handed_on(solver: str) -> list[str]:
    """ALPS as `best` has it, on a problem that another solver hands on to it."""
    solvers = "lvlm_prune.methods.solvers"
    start = [f"--pruning.solver.start={solvers}.ALPSSolver", "--pruning.solver.start.iterations=16"]
    return [f"--pruning.solver={solvers}.{solver}", *start]


CHOICES: dict[str, list[str]] = {
    "best": [],
    "8 iterations": ["--pruning.solver.iterations=8"],
    "24 iterations": ["--pruning.solver.iterations=24"],
    "surveyed by ALPS": ["--pruning.solver=benchmarks.choices.SurveyedByALPS", "--pruning.solver.iterations=16"],
    "each Linear surveyed": ["--pruning.allocation.groups=linear"],
    "whole blocks surveyed": ["--pruning.allocation.groups=block"],
    "2 survey samples": ["--pruning.allocation.samples=2"],
    "8 survey samples": ["--pruning.allocation.samples=8"],
    "at most 0.1 from the target": ["--pruning.allocation.width=0.1"],
    "at most 0.25 from the target": _WIDER,
    "at most 0.4 from the target": ["--pruning.allocation.width=0.4"],
    "whole blocks, at most 0.25": _BLOCKS,
    "whole blocks, at most 0.4": ["--pruning.allocation.groups=block", "--pruning.allocation.width=0.4"],
    "at most 0.25, dense target": [*_WIDER, *_handed_on("DenseTargetSolver")],
    "whole blocks, at most 0.25, dense target": [*_BLOCKS, *_handed_on("DenseTargetSolver")],
    "at most 0.25, visual tokens weigh 0.3": [*_WIDER, *_handed_on("VisualWeightSolver")],
    "text tokens only": ["--pruning.pool=TextOnlyPool"],
    "tokens of ATV": ["--pruning.pool=AsymmetricPool"],
}


def run_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every choice at every target and seed, what is finished left out."""
    engine = BuiltinEngine(EmbeddedBenchmark(options.images, options.text, split="validation"))
    if "dense" not in results:
        results["dense"] = engine.score(CHECKPOINT).to_dict()
    for target in options.targets:
        for choice in options.choices:
            for seed in SEEDS:
                if (name := f"{choice} | {target} | {seed}") in results["runs"]:
                    continue
                where = f"--pruning.pattern={target}" if ":" in target else f"--pruning.sparsity={target}"
                with tempfile.TemporaryDirectory() as temporary:
                    output = Path(temporary) / "pruned"
                    own = [f"--data.seed={seed}", f"--output={output}"]
                    begin = time.process_time()
                    run("prune", *BASE, where, *CHOICES[choice], *FIXED, *own)
                    seconds = time.process_time() - begin
                    scores = engine.score(output)
                results["runs"][name] = {"cpu_seconds": seconds, "scores": scores.to_dict()}
                write(options.json, results)
                kept = retention(scores, Scores.from_dict(results["dense"])).average
                print(f"{name}: {100 * kept:.1f}%", flush=True)


def table(results: dict[str, Any]) -> str:
    """Retention in percent, mean over the seeds with the two values, as a Markdown table."""
    dense = Scores.from_dict(results["dense"])
    cells: dict[tuple[str, str], list[float]] = {}
    for name, result in results["runs"].items():
        choice, target, _ = name.split(" | ")
        kept = retention(Scores.from_dict(result["scores"]), dense)
        cells.setdefault((choice, target), []).append(100 * kept.average)
    targets = sorted({target for _, target in cells}, key=lambda target: (":" in target, target))
    heads = ["choice", *(target if ":" in target else f"{100 * float(target):g}%" for target in targets)]
    rows = []
    for choice in dict.fromkeys(choice for choice, _ in cells):
        row = [choice]
        for target in targets:
            values = cells.get((choice, target), [])
            each = ", ".join(f"{value:.1f}" for value in values)
            row.append(f"{statistics.mean(values):.1f} ({each})" if values else "")
        rows.append(row)
    return markdown_table(heads, rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/choices.json"), help="results, kept up to date")
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES), metavar="CHOICE")
    parser.add_argument("--targets", nargs="+", default=["0.7", "0.8"], help="sparsities and patterns")
    parser.add_argument("--images", type=int, default=100, help="images of the benchmark")
    parser.add_argument("--text", type=int, default=200, help="text questions of the benchmark")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.json.read_text()) if options.json.is_file() else {"runs": {}}
    run_all(options, results)
    if options.markdown:
        print(table(results))


if __name__ == "__main__":
    main()
