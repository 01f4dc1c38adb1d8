"""lvlm-prune beside other tools that prune after training, on a text decoder that all of them read.

    python benchmarks/peers.py --json benchmarks/peers.json \\
        --python llmcompressor=/path/to/environment/bin/python --python torchao=/path/to/other/bin/python

A random Llama (float32, channels of very different scale), the same samples and the same sparsity for all; every tool
in an environment of its own, made by hand:

    python -m venv peers/llmcompressor && peers/llmcompressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m venv peers/torchao && peers/torchao/bin/pip install torch==2.13.0 torchao==0.18.0 transformers==5.17.0

Measured is the whole call of each tool on a model in memory, relative to the floor (two bare forwards of all samples
through the decoder, in the same process just before). Tools take turns; medians are reported. The layer reconstruction
error is the mean over Linears of |(W - W') X|^2 / |W X|^2 with the inputs X of the dense model on samples that nobody
calibrated on; the output error is the same of the last hidden states of the whole pruned model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("peer_worker.py")
METHODS = ("wanda", "sparsegpt")
NAMES = ("lvlm-prune", "llmcompressor", "torchao")


def random_llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of random weights whose norms scale channels very differently, as those of trained models do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data.copy_(torch.randn_like(parameter).mul(0.8).exp())
    return model


def measure(python: str, tool: str, method: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | str:
    """One run of the worker; the reason in a line where it does not work."""
    command = [python, str(WORKER), f"--tool={tool}", f"--method={method}", f"--folder={folder}"]
    command += [f"--sparsity={options.sparsity}", f"--threads={options.threads}"]
    # What is on this environment's path is not to be found in a peer's.
    hidden = set() if tool == "lvlm-prune" else {"PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        return finished.stderr.strip().splitlines()[-1]
    return json.loads(finished.stdout.strip().splitlines()[-1])


@torch.no_grad()
def errors(dense: LlamaForCausalLM, pruned: dict[str, dict[str, Tensor]], ids: Tensor) -> dict[str, dict[str, float]]:
    """Layer reconstruction error and output error of each pruned model, on held-out samples."""
    linears = {name: module for name, module in dense.model.layers.named_modules() if isinstance(module, nn.Linear)}
    lost = {key: dict.fromkeys(linears, 0.0) for key in pruned}
    kept = dict.fromkeys(linears, 0.0)

    def hook(name: str):
        def compare(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept[name] += output.square().sum().item()
            for key, weights in pruned.items():
                change = module.weight - weights[f"model.layers.{name}.weight"]
                lost[key][name] += (inputs[0] @ change.T).square().sum().item()

        return compare

    handles = [module.register_forward_hook(hook(name)) for name, module in linears.items()]
    expected = [dense.model(input_ids=row[None], use_cache=False).last_hidden_state for row in ids]
    for handle in handles:
        handle.remove()
    found = {}
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    for key, weights in pruned.items():
        dense.load_state_dict(weights)
        outputs = [dense.model(input_ids=row[None], use_cache=False).last_hidden_state for row in ids]
        difference = sum((one - other).square().sum().item() for one, other in zip(outputs, expected))
        found[key] = {
            "layer_reconstruction_error": statistics.mean(lost[key][name] / kept[name] for name in linears),
            "output_error": difference / sum(output.square().sum().item() for output in expected),
        }
    dense.load_state_dict(state)
    return found


def sparsity(dense: LlamaForCausalLM, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Share of zeros in the Linears of the blocks, and tensors elsewhere that are not what they were."""
    blocks = {name: value for name, value in weights.items() if name.endswith("_proj.weight")}
    state = dense.state_dict()
    changed = [name for name, value in weights.items() if name not in blocks and not torch.equal(value, state[name])]
    zeros = sum(int((value == 0).sum()) for value in blocks.values())
    return {
        "sparsity": zeros / sum(value.numel() for value in blocks.values()),
        "sparsity_of_linears": [
            min((value == 0).float().mean().item() for value in blocks.values()),
            max((value == 0).float().mean().item() for value in blocks.values()),
        ],
        "changed_elsewhere": changed,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all tools in turn."""
    pythons = {"lvlm-prune": sys.executable} | dict(item.split("=", 1) for item in options.python)
    left_out = {name: "no --python was given for it" for name in NAMES if name not in pythons}
    model = random_llama(options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, options.vocabulary, (options.samples + 4, options.length), generator=generator)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "dense")
        save_file({"input_ids": ids[:-4].contiguous()}, folder / "samples.safetensors")
        runs: dict[str, list[dict[str, Any]]] = {}
        for repetition in range(options.repetitions):
            for method in METHODS:
                for tool, python in pythons.items():
                    key = f"{tool} {method}"
                    if key in left_out:
                        continue
                    found = measure(python, tool, method, folder, options)
                    if isinstance(found, str):
                        left_out[key] = found
                    else:
                        runs.setdefault(key, []).append(found)
            print(f"repetition {repetition + 1} of {options.repetitions}", flush=True)
        pruned = {key: load_file(folder / f"{key.replace(' ', '-')}.safetensors") for key in runs}
    quality = errors(model, pruned, ids[-4:])
    for key, repeated in runs.items():
        results[key] = {
            "versions": repeated[0]["versions"],
            "seconds": {
                clock: statistics.median(one["seconds"][clock] for one in repeated) for clock in ("cpu", "wall")
            },
            "ratio_to_floor": {
                clock: statistics.median(one["seconds"][clock] / one["floor"][clock] for one in repeated)
                for clock in ("cpu", "wall")
            },
            "peak_bytes": statistics.median(one["peak_bytes"] for one in repeated),
            "peak_added_bytes": statistics.median(one["peak_added_bytes"] for one in repeated),
            **sparsity(model, pruned[key]),
            **quality[key],
        }
    return {
        "date": str(date.today()),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "python")},
        "results": results,
        "left_out": left_out,
    }


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| tool | s | ratio to floor | memory added, MiB | sparsity | layer error | output error |",
        "|---" * 7 + "|",
    ]
    for key, result in found["results"].items():
        tool, method = key.split()
        lines.append(
            f"| {tool} {result['versions'][tool]} {method} | {result['seconds']['cpu']:.1f} | "
            f"{result['ratio_to_floor']['cpu']:.2f} | {result['peak_added_bytes'] / 2**20:.0f} | "
            f"{result['sparsity']:.3f} | {result['layer_reconstruction_error']:.4f} | {result['output_error']:.4f} |"
        )
    lines += [f"\nleft out: {name}: {reason}" for name, reason in found["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH", help="interpreter of a peer")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=720, help="tokens per sample")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    found = run(options)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
