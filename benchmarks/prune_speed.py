"""How close pruning comes to the two forward passes that it cannot avoid.

    python benchmarks/prune_speed.py --json benchmarks/prune_speed.json
    python benchmarks/prune_speed.py --preset 7b --device cuda --samples 128 --dtype bfloat16 --json OUT

The floor is two bare forwards of all samples through all blocks, in the same process. A method's time is survey +
gather + score (+ solve) + propagate; catching, reading, writing and verifying are not in it. Floor and methods take
turns; a ratio is the median over repetitions, each against the floor measured just before. On a CPU it is processor
time at one thread, on a GPU wall time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lvlm_prune import load_pruning, prune
from lvlm_prune.blocks import BlockRunner
from lvlm_prune.callbacks import PruneCallback
from lvlm_prune.measuring import Stopwatch, peak_memory

RECIPES = Path(__file__).parents[1] / "configs" / "prune"
PRESETS = {
    "mid": {"hidden": 512, "blocks": 6, "intermediate": 1536, "heads": 8, "kv_heads": 4, "vocabulary": 2000},
    "7b": {"hidden": 3584, "blocks": 28, "intermediate": 18944, "heads": 28, "kv_heads": 4, "vocabulary": 152064},
}
IMAGE, VISION_START, VISION_END = 5, 6, 7

_PHASES = ("survey", "gather", "score", "propagate")
# A method that takes so many floors (ECoFLaP: 25) is measured once.
_LONG = 10


def random_model(sizes: dict[str, int], dtype: torch.dtype, device: str) -> nn.Module:
    """A Qwen2-VL of random weights with these decoder sizes."""
    config = random_config(sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype).eval()


def random_config(sizes: dict[str, int]) -> Qwen2VLConfig:
    """Configuration of a Qwen2-VL with these decoder sizes and a small vision tower."""
    rotary = sizes["hidden"] // sizes["heads"] // 2
    sections = [rotary - 2 * (3 * rotary // 8), 3 * rotary // 8, 3 * rotary // 8]
    return Qwen2VLConfig(
        text_config={
            "vocab_size": sizes["vocabulary"],
            "hidden_size": sizes["hidden"],
            "intermediate_size": sizes["intermediate"],
            "num_hidden_layers": sizes["blocks"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["kv_heads"],
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": sizes["hidden"], "num_heads": 2, "mlp_ratio": 2},
        image_token_id=IMAGE,
        video_token_id=8,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def random_samples(count: int, visual: int, text: int, vocabulary: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Samples of about `visual` image tokens and `text` text tokens, no two of the same length."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(count):
        width = 2 * (visual // 20 + index % 3)
        image = [VISION_START, *[IMAGE] * (width // 2 * 20), VISION_END]
        words = torch.randint(10, vocabulary, (text + index,), generator=generator).tolist()
        ids = torch.tensor([words[:10] + image + words[10:]])
        inputs: dict[str, Tensor] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(width * 40, 3 * 2 * 14 * 14, generator=generator).to(dtype),
            "image_grid_thw": torch.tensor([[1, 40, width]]),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
        samples.append({name: value.to(device) for name, value in inputs.items()})
    return samples


class Phases(PruneCallback):
    """Adds up the seconds of all blocks, and counts forwards."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.forwards = 0

    @property
    def total(self) -> float:
        """Seconds of all that is compared with the floor."""
        return sum(self.seconds.get(name, 0.0) for name in _PHASES)

    def on_block_end(self, trainer, pl_module, block) -> None:
        for phase, seconds in block.record["seconds"].items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.forwards += block.forwards


@torch.no_grad()
def floor_seconds(model: nn.Module, samples: list[dict]) -> float:
    """Two bare forwards of every sample through every block."""
    runner = BlockRunner(model)
    batches = [runner.catch(sample) for sample in samples]
    clock = Stopwatch()
    for index in range(len(runner)):
        for batch in batches:
            runner.run(index, batch)
        for batch in batches:
            runner.advance(index, batch)
    return clock.lap()


def method_phases(model: nn.Module, dense: dict[str, Tensor], samples: list[dict], recipe: str) -> Phases:
    """One run of a recipe; the model is dense again afterwards."""
    phases = Phases()
    manifest = prune(model, samples, load_pruning(RECIPES / f"{recipe}.yaml"), callbacks=[phases])
    survey = manifest.get("survey", {})
    phases.seconds["survey"] = survey.get("seconds", 0.0)
    phases.forwards += survey.get("block_forwards", 0)
    model.load_state_dict(dense)
    return phases


def peak_bytes(device: str) -> int:
    """Peak memory of the device, or of the process."""
    peak = peak_memory()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return peak


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, floor and methods in turn."""
    sizes, dtype = PRESETS[options.preset], getattr(torch, options.dtype)
    model = random_model(sizes, dtype, options.device)
    samples = random_samples(options.samples, options.visual, options.text, sizes["vocabulary"], dtype, options.device)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    floors: list[float] = []
    runs: dict[str, list[Phases]] = {recipe: [] for recipe in options.recipes}
    peaks: dict[str, int] = {}
    for repetition in range(options.repetitions + 1):
        floors.append(floor_seconds(model, samples))
        for recipe in options.recipes:
            if repetition and runs[recipe][-1].total > _LONG * floors[0]:
                continue
            peak_bytes(options.device)
            runs[recipe].append(method_phases(model, dense, samples, recipe))
            peaks[recipe] = peak_bytes(options.device)
        print(f"repetition {repetition} of {options.repetitions}, floor {floors[-1]:.2f} s", flush=True)
    floor = statistics.median(floors[1:])  # the first one warms up
    methods: dict[str, Any] = {}
    for recipe, repeated in runs.items():
        measured = repeated[1:] or repeated
        ratios = [run.total / beside for run, beside in zip(measured, floors[1:])]
        phase = {name: statistics.median(run.seconds.get(name, 0.0) for run in measured) for name in _PHASES}
        methods[recipe] = {
            "seconds": statistics.median(run.total for run in measured),
            "ratio_to_floor": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "phases": phase | {"statistics": max(phase["gather"] - floor / 2, 0.0)},
            "repetitions": len(measured),
            "forwards_per_sample_and_block": repeated[-1].forwards / len(samples) / sizes["blocks"],
            "peak_bytes": peaks[recipe],
        }
    wanda = methods.get("wanda", {}).get("seconds")
    for method in methods.values():
        method["ratio_to_wanda"] = method["seconds"] / wanda if wanda else None
    return {
        "date": str(date.today()),
        "machine": machine(options),
        "options": {name: str(value) for name, value in vars(options).items() if name != "json"},
        "tokens": sum(sample["input_ids"].numel() for sample in samples),
        "floor_seconds": floor,
        "floor_spread": [min(floors[1:]), max(floors[1:])],
        "methods": methods,
    }


def machine(options: argparse.Namespace) -> str:
    """What it was measured on."""
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {options.threads} thread, torch {torch.__version__}"


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = ["| method | s | ratio to floor | ratio to Wanda | forwards | statistics, s | score, s |", "|---" * 7 + "|"]
    for recipe, method in results["methods"].items():
        wanda = f"{method['ratio_to_wanda']:.2f}" if method["ratio_to_wanda"] else ""
        phases = method["phases"]
        lines.append(
            f"| {recipe} | {method['seconds']:.2f} | {method['ratio_to_floor']:.2f} | {wanda} | "
            f"{method['forwards_per_sample_and_block']:.2f} | {phases['statistics']:.2f} | {phases['score']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="mid")
    parser.add_argument("--recipes", nargs="+", default=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--visual", type=int, default=600, help="visual tokens per sample, about")
    parser.add_argument("--text", type=int, default=120, help="text tokens per sample, about")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        Stopwatch.clock = staticmethod(time.process_time)
    results = run(options)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"floor {results['floor_seconds']:.2f} s, {results['machine']}\n\n{table(results)}")


if __name__ == "__main__":
    main()
