"""How much memory it takes to prune a checkpoint that is larger than that.

    python -m benchmarks.memory --json benchmarks/memory.json
    python -m benchmarks.memory --gigabytes 0.6 --blocks 6 --json OUT

Writes a random Qwen2-VL in bfloat16, prunes it with ATV in a process of its own, and samples the anonymous resident
memory of that process from outside. It is to stay below: libraries + vision tower and embeddings + three blocks + what
is planned for activations. Checkpoint and output are removed at the end; twice the size is needed on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.prune_speed import RECIPES, machine, random_config, random_samples

_SHARD = 2**30
_HEAD = 128


def decoder_sizes(nbytes: float, blocks: int, vocabulary: int = 32000) -> dict[str, int]:
    """Sizes of a decoder whose `blocks` blocks take about `nbytes` in bfloat16."""
    weights = nbytes / 2 / blocks
    kv_heads = max(round((weights / 12) ** 0.5 / _HEAD / 4), 1)
    heads, hidden = 4 * kv_heads, 4 * kv_heads * _HEAD
    attention = 2 * hidden**2 + 2 * hidden * kv_heads * _HEAD
    intermediate = max(round((weights - attention) / 3 / hidden / 64), 1) * 64
    return {
        "hidden": hidden,
        "blocks": blocks,
        "intermediate": intermediate,
        "heads": heads,
        "kv_heads": kv_heads,
        "vocabulary": vocabulary,
    }


def write_checkpoint(folder: Path, config: Qwen2VLConfig) -> dict[str, int]:
    """Write random weights shard by shard, one tensor in memory at a time; bytes of each tensor by name."""
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLForConditionalGeneration(config)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards = list(_shards(sizes))
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        header, position = {}, 0
        for name in names:
            end = position + sizes[name]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header).encode()
        with open(folder / file_name, "wb", buffering=0) as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for name in names:
                tensor = torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16)
                tensor = 1 + 0.02 * tensor if len(shapes[name]) == 1 else 0.02 * tensor
                content = memoryview(tensor.flatten().view(torch.uint8).numpy().data)
                while content:
                    content = content[file.write(content) :]
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sizes


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names of the tensors in each file of about a gigabyte."""
    names: list[str] = []
    for name in sizes:
        names.append(name)
        if sum(sizes[one] for one in names) >= _SHARD:
            yield names
            names = []
    if names:
        yield names


def sampled_peak(process: subprocess.Popen, interval: float = 0.005) -> int:
    """The most anonymous resident bytes of a process until it ends, looked at every 5 ms."""
    peak = 0
    status = os.open(f"/proc/{process.pid}/status", os.O_RDONLY)
    try:
        while process.poll() is None:
            anonymous = os.pread(status, 8192, 0).partition(b"RssAnon:")[2].split(maxsplit=1)
            peak = max(peak, 1024 * int(anonymous[0])) if anonymous else peak
            time.sleep(interval)
    except ProcessLookupError:
        pass
    finally:
        os.close(status)
    return peak


def write_inputs(
    gigabytes: float, blocks: int, samples: int, folder: Path, vocabulary: int = 32000, visual: int = 200
) -> dict[str, Any]:
    """Write a checkpoint and calibration samples; sizes of the decoder, tokens, bytes by tensor.

    Args:
        gigabytes: Size of the decoder's blocks, 10^9 bytes.
        blocks: Number of blocks.
        samples: Number of calibration samples.
        folder: An empty folder.
        vocabulary: Size of the vocabulary.
        visual: About as many image tokens has a sample, beside 60 text tokens.

    Raises:
        RuntimeError: There is no room on the disk for it and what `measure` writes.
    """
    sizes = decoder_sizes(1e9 * gigabytes, blocks, vocabulary)
    free = shutil.disk_usage(folder).free
    if free < 2.5e9 * (gigabytes + 0.3):
        raise RuntimeError(f"{folder} has {free / 1e9:.1f} GB free, {2.5 * (gigabytes + 0.3):.1f} are needed")
    (folder / "dense").mkdir()
    tensors = write_checkpoint(folder / "dense", random_config(sizes))
    inputs = random_samples(samples, visual, 60, vocabulary, torch.float32, "cpu")
    save_file(
        {f"s{j}.{name}": value for j, sample in enumerate(inputs) for name, value in sample.items()},
        folder / "calibration.safetensors",
    )
    tokens = sum(sample["input_ids"].numel() for sample in inputs)
    return {"decoder": sizes, "samples": samples, "tokens": tokens, "tensors": tensors}


def _start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "lvlm_prune.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def measure(
    folder: Path, written: dict[str, Any], recipe: str, *options: str, start: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Prune what `write_inputs` wrote into `folder` in a child process, and report its memory.

    Args:
        folder: The folder.
        written: What `write_inputs` returned.
        recipe: Name of a file in `configs/prune`.
        options: More options of the command.
        start: Starts `lvlm-prune` with these arguments; returns what `subprocess.Popen` would. Default: in a Python
            of its own.

    Raises:
        RuntimeError: The command fails.
    """
    output = folder / recipe
    arguments = ["prune", f"--config={RECIPES / recipe}.yaml"]
    arguments += [f"--model.path={folder / 'dense'}", "--data.source=TensorSource"]
    arguments += [f"--data.source.path={folder / 'calibration.safetensors'}"]
    arguments += [f"--output={output}", "--trainer.accelerator=cpu", *options]
    started = time.perf_counter()
    child = (start or _start)(arguments)
    peak = sampled_peak(child)
    seconds = time.perf_counter() - started
    said = "".join(child.communicate())
    if child.returncode:
        raise RuntimeError(said[-2000:])
    manifest = json.loads((output / "pruning.json").read_text())
    shutil.rmtree(output)
    tensors, blocks = written["tensors"], written["decoder"]["blocks"]
    memory = manifest["memory"]
    of_block = [sum(size for name, size in tensors.items() if f".layers.{index}." in name) for index in range(blocks)]
    frame = sum(size for name, size in tensors.items() if ".layers." not in name and not name.startswith("lm_head"))
    activations = memory["samples"] + memory["phases"].get("gathering", max(of_block)) - max(of_block)
    split = {name: sum(block["seconds"].get(name, 0.0) for block in manifest["blocks"]) for name in _PHASES}
    return {
        "recipe": recipe,
        "options": list(options),
        "checkpoint_bytes": sum(tensors.values()),
        **{name: written[name] for name in ("decoder", "samples", "tokens")},
        "hidden_states": memory["hidden_states"],
        "peak_bytes": peak,
        "peak_of_manifest_bytes": memory["measured"]["host"],
        "predicted_bytes": memory["predicted"]["host"],
        "libraries_bytes": memory["baseline"],
        "non_block_bytes": frame,
        "block_bytes": max(of_block),
        "planned_activations_bytes": activations,
        "limit_bytes": memory["baseline"] + frame + 3 * max(of_block) + activations,
        "seconds": seconds,
        "seconds_of_blocks": {
            "read": split["read"],
            "forward": split["gather"] + split["propagate"],
            "score": split["score"] + split["solve"],
            "write": split["write"],
        },
    }


_PHASES = ("read", "gather", "score", "solve", "propagate", "write")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the decoder's blocks")
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--recipe", default="atv")
    parser.add_argument("--folder", type=Path, help="where checkpoint and output are written; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        written = write_inputs(options.gigabytes, options.blocks, options.samples, Path(folder))
        found = measure(Path(folder), written, options.recipe)
    hardware = machine(argparse.Namespace(device="cpu", threads=os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    results = {"date": str(date.today()), "machine": hardware} | found
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
