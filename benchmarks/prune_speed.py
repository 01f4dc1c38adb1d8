"""How close pruning comes to the two forward passes that it cannot avoid.

    python benchmarks/prune_speed.py --json benchmarks/prune_speed.json
    python benchmarks/prune_speed.py --recipes wanda wanda:dense atv atv:dense --json OUT    # one pass beside two
    python benchmarks/prune_speed.py --preset 7b --device cuda --samples 128 --dtype bfloat16 --json OUT

The floor is two bare forwards of all samples through all blocks, in the same process. A method's time is survey +
gather + score + solve + propagate on a model in memory; catching, reading, writing and verifying are not in it. Floor
and methods take turns; a ratio is the median over repetitions, each against the floor measured just before. On a CPU it
is processor time at one thread, on a GPU wall time. Before that, as a warm-up, each method prunes the same model from
disk to disk once: that tells the seconds that the loop stands still to read and write, and the memory that a run takes.

Methods that the JSON file holds already stay there, so they can be measured in groups; `ratio_to_wanda` is the
quotient of the ratios to the floor.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lvlm_prune import load_pruning, prune
from lvlm_prune.api import InputsSource
from lvlm_prune.blocks import BlockRunner
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.data import CalibrationDataModule
from lvlm_prune.memory.measuring import Stopwatch, anonymous_memory
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.manifest import METHOD_PHASES, Manifest
from lvlm_prune.run import RunOptions, RunTrainer
from lvlm_prune.runs.prune.run import PruneRun

RECIPES = Path(__file__).parents[1] / "configs" / "prune"
PRESETS = {
    "mid": {"hidden": 512, "blocks": 6, "intermediate": 1536, "heads": 8, "kv_heads": 4, "vocabulary": 2000},
    "7b": {"hidden": 3584, "blocks": 28, "intermediate": 18944, "heads": 28, "kv_heads": 4, "vocabulary": 152064},
}
IMAGE, VISION_START, VISION_END = 5, 6, 7

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


@torch.no_grad()
def floor_seconds(model: nn.Module, samples: list[dict]) -> float:
    """Two bare forwards of every sample through every block."""
    runner = BlockRunner(model)
    batches = [runner.catch(sample) for sample in samples]
    clock = Stopwatch(samples[0]["input_ids"].device)
    for index in range(len(runner)):
        for batch in batches:
            runner.run(index, batch)
        for batch in batches:
            runner.advance(index, batch)
    return clock.lap()


def method_of(recipe: str) -> BlockwisePruning:
    """The method of a recipe; of `atv:dense`, calibrated on the dense model's inputs."""
    name, _, calibrate_on = recipe.partition(":")
    return load_pruning(RECIPES / f"{name}.yaml", calibrate_on=calibrate_on or "pruned")


def in_memory(model: nn.Module, dense: dict[str, Tensor], samples: list[dict], recipe: str) -> Manifest:
    """One run of a recipe; the model is dense again afterwards."""
    manifest = prune(model, samples, method_of(recipe))
    model.load_state_dict(dense)
    return manifest


def from_disk(folder: Path, samples: list[dict], recipe: str, device: str) -> dict[str, float]:
    """Seconds of reading and writing, and the most memory that a run from disk to disk takes beside what was there."""
    trainer = RunTrainer(
        accelerator=device,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[method_of(recipe)],
    )
    data = CalibrationDataModule(InputsSource(samples))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else anonymous_memory()
    with tempfile.TemporaryDirectory(dir=folder.parent) as output:
        options = RunOptions(evaluate=False, report=False, quiet=True)
        manifest = PruneRun(trainer, LVLMModule(str(folder)), data, output, options)()
    measured = manifest["memory"]["measured"]["device" if device == "cuda" else "host"]
    seconds = {name: sum(block["seconds"][name] for block in manifest["blocks"]) for name in ("read", "write")}
    return seconds | {"peak_added_bytes": measured - before}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all methods, floor and methods in turn."""
    sizes, dtype = dict(PRESETS[options.preset]), getattr(torch, options.dtype)
    sizes["blocks"] = options.blocks or sizes["blocks"]
    model = random_model(sizes, dtype, options.device)
    samples = random_samples(options.samples, options.visual, options.text, sizes["vocabulary"], dtype, options.device)
    disk: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model.save_pretrained(Path(folder) / "dense")
        for recipe in options.recipes:
            disk[recipe] = from_disk(Path(folder) / "dense", samples, recipe, options.device)
            print(f"{recipe} from disk to disk", flush=True)
    if options.device == "cpu":
        Stopwatch.clock = staticmethod(time.process_time)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    floor_seconds(model, samples)
    floors: list[float] = []
    runs: dict[str, list[Manifest]] = {recipe: [] for recipe in options.recipes}
    for repetition in range(options.repetitions):
        floors.append(floor_seconds(model, samples))
        for recipe in options.recipes:
            if repetition and runs[recipe][0].cost()["seconds"] > _LONG * floors[0]:
                continue
            runs[recipe].append(in_memory(model, dense, samples, recipe))
        print(f"repetition {repetition + 1} of {options.repetitions}, floor {floors[-1]:.2f} s", flush=True)
    return {recipe: measured(repeated, floors, len(samples)) | disk[recipe] for recipe, repeated in runs.items()}


def measured(runs: list[Manifest], floors: list[float], samples: int) -> dict[str, Any]:
    """What the repetitions of one method say.

    Args:
        runs: Their manifests.
        floors: The floor before each.
        samples: Number of samples.
    """
    seconds = [run.cost()["seconds"] for run in runs]
    ratios = [one / floor for one, floor in zip(seconds, floors)]
    phases = {
        phase: statistics.median(sum(block["seconds"][phase] for block in run["blocks"]) for run in runs)
        for phase in METHOD_PHASES
    }
    forward = min(statistics.median(floors) / 2, phases["gather"])
    return {
        "date": str(date.today()),
        "samples": samples,
        "repetitions": len(runs),
        "seconds": statistics.median(seconds),
        "ratio_to_floor": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "survey": statistics.median(run.get("survey", {}).get("seconds", 0.0) for run in runs),
        "forward": forward + phases["propagate"],
        "statistics": phases["gather"] - forward,
        "score": phases["score"],
        "solve": phases["solve"],
        "forwards_per_sample_and_block": runs[0].cost()["block_forwards"] / (samples * len(runs[0]["blocks"])),
        "floor_seconds": statistics.median(floors),
        "floor_spread": [min(floors), max(floors)],
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
    heads = ["method", "ratio to floor", "ratio to Wanda", "forwards", "s", "survey", "forward", "statistics", "score"]
    heads += ["solve", "read", "write", "memory, MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for recipe, method in results["methods"].items():
        wanda = f"{method['ratio_to_wanda']:.2f}" if "ratio_to_wanda" in method else ""
        cells = [recipe, f"{method['ratio_to_floor']:.2f}", wanda, f"{method['forwards_per_sample_and_block']:.2f}"]
        cells += [f"{method[name]:.2f}" for name in ("seconds", *heads[5:12])]
        lines.append("| " + " | ".join([*cells, f"{method['peak_added_bytes'] / 2**20:.0f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; methods that it holds already stay")
    parser.add_argument("--preset", choices=PRESETS, default="mid")
    parser.add_argument("--blocks", type=int, default=0, help="decoder blocks; default: as many as the preset has")
    parser.add_argument("--recipes", nargs="+", default=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--visual", type=int, default=600, help="visual tokens per sample, about")
    parser.add_argument("--text", type=int, default=120, help="text tokens per sample, about")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: temporary")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setting = {"machine": machine(options)} | {
        name: getattr(options, name) for name in ("preset", "visual", "text", "dtype")
    }
    if options.blocks:
        setting["blocks"] = options.blocks
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    if results and {name: results.get(name) for name in setting} != setting:
        raise SystemExit(f"{options.json} was measured with other options or elsewhere; write to another file")
    methods = results.get("methods", {}) | run(options)
    for method in methods.values():
        if "wanda" in methods:
            method["ratio_to_wanda"] = method["ratio_to_floor"] / methods["wanda"]["ratio_to_floor"]
    results = setting | {"methods": methods}
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{results['machine']}\n\n{table(results)}")


if __name__ == "__main__":
    main()
