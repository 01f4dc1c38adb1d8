"""How much faster several processes prune.

    python -m benchmarks.scaling --processes 2 --json benchmarks/scaling.json
    python -m benchmarks.scaling --processes 8 --accelerator cuda --preset 7b --dtype bfloat16 --samples 128 --json OUT

Prunes the same random Qwen2-VL from disk with 1, 2, ... processes, on CPUs of one thread each. The time is that of
catching, surveying and all blocks (read, gather, score, propagate, write), by the clock of the process that writes;
starting Python, copying the checkpoint and verifying the result are not in it. Every number of processes must give the
same zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.prune_speed import PRESETS, RECIPES, machine, random_model, random_samples


def prepare(folder: Path, preset: str, dtype: torch.dtype, samples: int, visual: int, text: int) -> None:
    """Write the model and its calibration samples."""
    sizes = PRESETS[preset]
    random_model(sizes, dtype, "cpu").save_pretrained(folder / "model")
    inputs = random_samples(samples, visual, text, sizes["vocabulary"], dtype, "cpu")
    tensors = {f"s{j}.{name}": value.contiguous() for j, sample in enumerate(inputs) for name, value in sample.items()}
    save_file(tensors, folder / "samples.safetensors")


def measure(folder: Path, recipe: str, count: int, accelerator: str) -> dict[str, Any]:
    """Prune once with `count` processes; seconds of each phase, and a digest of where the zeros are."""
    output = folder / f"{recipe}.{count}"
    command = [sys.executable, "-m", "lvlm_prune.cli", "prune", f"--config={RECIPES / recipe}.yaml"]
    command += [f"--model.path={folder / 'model'}", "--data.source=TensorSource"]
    command += [f"--data.source.path={folder / 'samples.safetensors'}", f"--output={output}", "--report=false"]
    command += [f"--trainer.accelerator={accelerator}", f"--trainer.devices={count}"]
    threads = {"OMP_NUM_THREADS": "1"} if accelerator == "cpu" else {}
    subprocess.run(command, check=True, env=os.environ | threads, stdout=subprocess.DEVNULL)
    manifest = json.loads((output / "pruning.json").read_text())
    seconds = {"catch": manifest["catch_seconds"], "survey": manifest.get("survey", {}).get("seconds", 0.0)}
    for block in manifest["blocks"]:
        for phase, spent in block["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    total = sum(seconds.values())
    return {
        "processes": count,
        "seconds": seconds,
        "total_seconds": total,
        "samples_per_second": manifest["calibration"]["num_samples"] / total,
    }


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Where the zeros of a checkpoint are."""
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor == 0 for shard in shards for name, tensor in load_file(shard).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="the largest number of processes")
    parser.add_argument("--recipes", nargs="+", default=["atv", "wanda", "sparsegpt"])
    parser.add_argument("--preset", choices=PRESETS, default="mid")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--visual", type=int, default=576)
    parser.add_argument("--text", type=int, default=144)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = getattr(torch, options.dtype)
        prepare(folder, options.preset, dtype, options.samples, options.visual, options.text)
        for recipe in options.recipes:
            rows = found[recipe] = []
            for count in range(1, options.processes + 1):
                row = measure(folder, recipe, count, options.accelerator)
                row["speedup"] = rows[0]["total_seconds"] / row["total_seconds"] if rows else 1.0
                expected, pruned = zeros(folder / f"{recipe}.1"), zeros(folder / f"{recipe}.{count}")
                row["same_masks"] = all(torch.equal(expected[key], pruned[key]) for key in expected)
                rows.append(row)
                print(
                    f"{recipe:12} {count} processes  {row['samples_per_second']:7.2f} samples/s  "
                    f"{row['speedup']:.2f}x  {'same masks' if row['same_masks'] else 'OTHER MASKS'}",
                    flush=True,
                )
    if options.json is not None:
        where = machine(argparse.Namespace(device=options.accelerator, threads=1))
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        record = {"date": date.today().isoformat(), "machine": where, "options": asked, "recipes": found}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
