"""What pruning a checkpoint of 72 B weights would take, as `--plan` says it: no weight is there, and none is read.

    python -m benchmarks.large_plan --markdown

Writes the headers of a LLaVA whose decoder has the sizes of Qwen2-72B; the files are sparse, 145 GB long, and take no
room on the disk (the file system must know sparse files). Tower and processor are the embedded model's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.demo import CHECKPOINT

SIZES = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
SHARD = 5 * 10**9
METHODS = ("wanda", "atv", "sparsegpt", "alps", "alps_dense_target", "best")


def write_headers(folder: Path) -> None:
    """A checkpoint whose tensors are holes."""
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    shutil.copy(CHECKPOINT / "chat_template.jinja", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= SIZES
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards(shapes()), start=1):
        name, header, position = f"model-{number:05}.safetensors", dict[str, Any](), 0
        for key, shape in shard.items():
            end = position + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            weight_map[key], position = name, end
        encoded = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shapes() -> dict[str, list[int]]:
    """Shape of each tensor: the embedded model's tower, and a decoder of `SIZES`."""
    width, wide, heads = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    queries, keys = SIZES["num_attention_heads"] * heads, SIZES["num_key_value_heads"] * heads
    found: dict[str, list[int]] = {}
    for name, tensor in CheckpointFolder(CHECKPOINT).tensors.items():
        shape = list(tensor.shape)
        if name.startswith("multi_modal_projector.linear_1"):
            found[name] = [width, *shape[1:]]
        elif name.startswith("multi_modal_projector.linear_2"):
            found[name] = [width] * len(shape)
        elif not name.startswith("language_model."):
            found[name] = shape
    decoder = "language_model.model"
    found[f"{decoder}.embed_tokens.weight"] = found["language_model.lm_head.weight"] = [SIZES["vocab_size"], width]
    found[f"{decoder}.norm.weight"] = [width]
    for index in range(SIZES["num_hidden_layers"]):
        block = f"{decoder}.layers.{index}"
        found |= {f"{block}.{name}_layernorm.weight": [width] for name in ("input", "post_attention")}
        found |= {f"{block}.mlp.{name}_proj.weight": [wide, width] for name in ("gate", "up")}
        found[f"{block}.mlp.down_proj.weight"] = [width, wide]
        found |= {f"{block}.self_attn.{name}_proj.weight": [keys, width] for name in ("k", "v")}
        found[f"{block}.self_attn.q_proj.weight"] = [queries, width]
        found[f"{block}.self_attn.o_proj.weight"] = [width, queries]
    return found


def shards(tensors: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The tensors file by file."""
    found: list[dict[str, list[int]]] = [{}]
    for name, shape in tensors.items():
        if found[-1] and 2 * sum(map(math.prod, (*found[-1].values(), shape))) > SHARD:
            found.append({})
        found[-1][name] = shape
    return found


def planned(folder: Path, method: str) -> str:
    """What `--plan` says of memory, per phase and in all."""
    command = [sys.executable, "-m", "lvlm_prune", "prune", "--plan=true", f"--method={method}"]
    command += [f"--model.path={folder}", "--data.source=EmbeddedSource", f"--output={folder}-pruned"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def row(method: str, plan: str) -> str:
    """One line of the table."""
    peak = re.findall(r"predicted peak: (\S+ \S+) of host memory", plan)
    phases = re.findall(r"memory beside libraries and samples: (.*)", plan)
    return f"| {method} | {peak[0]} | {phases[0]} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="recipes")
    parser.add_argument("--markdown", action="store_true", help="print a table, not the plans")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "72b"
        checkpoint.mkdir()
        write_headers(checkpoint)
        if options.markdown:
            print("| method | peak | memory beside libraries and samples |\n|---|---|---|")
        for method in options.methods:
            plan = planned(checkpoint, method)
            print(row(method, plan) if options.markdown else plan)


if __name__ == "__main__":
    main()
