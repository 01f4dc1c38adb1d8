"""How much smaller packed matrices are, and how much faster than dense ones, all in one run, as ratios.

    OMP_NUM_THREADS=1 python -m benchmarks.packed --part linears --json benchmarks/packed.json
    OMP_NUM_THREADS=1 python -m benchmarks.packed --part tokens  --json benchmarks/packed.json
    OMP_NUM_THREADS=1 python -m benchmarks.packed --part model   --json benchmarks/packed.json
    python -m benchmarks.packed --json benchmarks/packed.json --markdown

Each part takes less than three minutes and replaces its entry in the file. The opponents are torch's own dense
bfloat16 Linear and a dense kernel written with the same care as the packed one (`lvlm_dense` in `packed.cpp`). They and
the packed kernel take turns, over copies of the weights that no cache holds together, and medians are compared.

    linears   size, load time and one token, for shapes and sparsities, with the best instruction set and with AVX2;
              one shape in float16
    tokens    16 to 512 tokens at once
    model     tokens per second of a Llama of 1 B parameters with random weights, in transformers
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.prune_speed import machine
from lvlm_prune.packed.dense import DenseLinear
from lvlm_prune.packed.kernels import PackedMatrix, cpu, kernel_report, pack_rows, packed_linear, unpack_rows
from lvlm_prune.packed.kernels.native import Level, level, limited_to

SHAPES = [(4096, 14336), (4096, 4096), (8192, 2048)]
SPARSITIES = [0.5, 0.6, 0.7]
BEYOND_CACHES = 2**28
"""Bytes of dense weights that a measurement goes through before it comes back to the first."""

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
"""Blocks of Llama-3.2-1B. The head stays dense: the larger the vocabulary, the less is gained; here it is Llama 2's."""


def random_sparse(rows: int, columns: int, sparsity: float) -> Tensor:
    """Gaussian bfloat16 weights of which each row has this share of zeros, at random places."""
    dense = torch.randn(rows, columns) * 0.02
    for part in dense.split(512):
        noise = torch.rand(part.shape)
        part[noise < noise.kthvalue(int(columns * sparsity), dim=1, keepdim=True).values] = 0
    return dense.bfloat16()


def medians(contestants: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, float]:
    """Median time of each contestant; they take turns for about this long."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def in_turn(copies: list[Any]) -> Callable[[], Any]:
    """The next copy with every call."""

    def endless() -> Iterator[Any]:
        while True:
            yield from copies

    turn = endless()
    return lambda: next(turn)


def measure_linear(rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Size, load time and one token of one shape; torch's own product is of the same dtype."""
    dense = random_sparse(rows, columns, sparsity).to(dtype)
    copies = max(BEYOND_CACHES // dense.nbytes, 2)
    values, mask = pack_rows(dense)
    packed = PackedMatrix.from_bitmask(values, mask, (rows, columns))
    next_dense = in_turn([dense.clone() for _ in range(copies)])
    next_packed = in_turn([PackedMatrix.from_bitmask(values, mask, (rows, columns)) for _ in range(copies)])
    x = torch.randn(1, columns).to(dtype)
    contestants = {
        "torch": lambda: linear(x, next_dense()),
        "dense_kernel": lambda: cpu.dense_linear(x, next_dense()),
        "packed": lambda: packed_linear(x, next_packed()),
    }
    times = medians(contestants, seconds=4)
    steps = {
        "load": lambda: PackedMatrix.from_bitmask(values, mask, (rows, columns)),
        "pack": lambda: pack_rows(dense),
        "unpack": lambda: unpack_rows(values, mask, columns),
        "copy": lambda: dense.clone(),
    }
    speeds = {name: dense.nbytes / 1e9 / seconds for name, seconds in medians(steps, seconds=1).items()}
    return {
        "shape": [rows, columns],
        "sparsity": sparsity,
        "level": level().name.lower(),
        "dtype": str(dtype).removeprefix("torch."),
        "times_smaller": dense.nbytes / packed.nbytes,
        "faster_than_torch": times["torch"] / times["packed"],
        "faster_than_dense_kernel": times["dense_kernel"] / times["packed"],
        "gigabytes_per_second": speeds,
    }


def measure_tokens(rows: int, columns: int, sparsity: float, tokens: int) -> dict[str, Any]:
    """Many tokens at once, against torch's dense bfloat16 and float32."""
    dense = random_sparse(rows, columns, sparsity)
    packed, x = PackedMatrix.from_dense(dense), torch.randn(tokens, columns).bfloat16()
    wide = dense.float()
    contestants = {
        "packed": lambda: packed_linear(x, packed),
        "torch": lambda: linear(x, dense),
        "torch_float32": lambda: linear(x.float(), wide).bfloat16(),
    }
    times = medians(contestants, seconds=3, least=3)
    return {
        "shape": [rows, columns],
        "sparsity": sparsity,
        "tokens": tokens,
        "faster_than_torch": times["torch"] / times["packed"],
        "faster_than_torch_float32": times["torch_float32"] / times["packed"],
    }


class Switched(nn.Module):
    """A Linear that is dense or packed, as `way` says; all in one process, so that they can take turns."""

    way = "torch"

    def __init__(self, dense: Tensor) -> None:
        super().__init__()
        self.dense, self.packed = dense, PackedMatrix.from_dense(dense)

    def forward(self, x: Tensor) -> Tensor:
        if Switched.way == "packed":
            return packed_linear(x, self.packed)
        if Switched.way == "dense_kernel" and x.numel() == x.shape[-1]:
            y = cpu.dense_linear(x.reshape(1, -1), self.dense)
            assert y is not None
            return y.view(*x.shape[:-1], -1)
        return linear(x, self.dense)


def random_llama(sparsity: float) -> nn.Module:
    """A decoder of 1 B parameters; four blocks have weights of their own, which the others share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA)
    blocks = config.num_hidden_layers
    config.num_hidden_layers = 4
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.heads = {"torch": model.lm_head, "kernel": copy.copy(model.lm_head)}  # type: ignore[assignment]
    model.heads["kernel"].__class__ = DenseLinear  # type: ignore[index,assignment]
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            path, _, leaf = name.rpartition(".")
            switched = Switched(random_sparse(*module.weight.shape, sparsity))
            setattr(model.model.layers.get_submodule(path), leaf, switched)
    layers = list(model.model.layers)
    for index in range(4, blocks):
        layers.append(_same_weights(layers[index % 4], index))
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = blocks
    return model


def _same_weights(layer: nn.Module, index: int) -> nn.Module:
    """A block with the weights of another one and a place in the cache of its own."""
    shared = {id(value): value for value in layer.parameters()}
    shared |= {id(module): module for module in layer.modules() if isinstance(module, Switched)}
    twin = copy.deepcopy(layer, shared)
    twin.self_attn.layer_idx = index  # type: ignore[union-attr,assignment]
    return twin


def measure_model(sparsity: float, prompt: int = 8, steps: int = 6) -> dict[str, Any]:
    """Prefill and greedy decoding, in transformers."""
    model = random_llama(sparsity)
    ids = torch.randint(0, LLAMA["vocab_size"], (1, prompt))
    decode: dict[str, list[float]] = {"torch": [], "dense_kernel": [], "packed": []}
    prefill: dict[str, list[float]] = {way: [] for way in decode}
    for _ in range(3):
        for way in decode:
            Switched.way = way
            model.lm_head = model.heads["torch" if way == "torch" else "kernel"]  # type: ignore[index]
            begin = time.perf_counter()
            out = model(ids, use_cache=True)
            prefill[way].append(time.perf_counter() - begin)
            for _ in range(steps):
                token = out.logits[:, -1:].argmax(dim=-1)
                begin = time.perf_counter()
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                decode[way].append(time.perf_counter() - begin)
    times = {way: statistics.median(values[1:]) for way, values in decode.items()}
    first = {way: statistics.median(values) for way, values in prefill.items()}
    return {
        "sparsity": sparsity,
        "faster_than_torch": times["torch"] / times["packed"],
        "faster_than_dense_kernel": times["dense_kernel"] / times["packed"],
        "tokens_per_second": {way: 1 / seconds for way, seconds in times.items()},
        f"prefill_{prompt}_faster_than_torch": first["torch"] / first["packed"],
    }


def run_part(part: str, sparsities: list[float]) -> Iterator[dict[str, Any]]:
    """The measurements of one part."""
    if part == "model":
        yield from map(measure_model, sparsities)
    elif part == "tokens":
        for tokens in (16, 32, 64, 128, 512):
            yield measure_tokens(4096, 4096, sparsities[0], tokens)
    else:
        for shape in SHAPES:
            yield from (measure_linear(*shape, sparsity) for sparsity in sparsities)
        yield measure_linear(*SHAPES[0], sparsities[0], torch.float16)
        if level() > Level.AVX2:
            with limited_to("avx2"):
                yield measure_linear(*SHAPES[0], sparsities[0])


def markdown(record: dict[str, Any]) -> str:
    """The table for the README: shapes as rows, sparsities as columns; threads as they were measured."""
    lines = []
    for threads, parts in record["threads"].items():
        sparsities = sorted({entry["sparsity"] for entry in parts.get("linears", [])})
        if sparsities:
            plural = "s" * (threads != "1")
            lines.append(f"| {threads} thread{plural} | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |")
            lines.append("|---|" + "---|" * len(sparsities))
        first = parts.get("linears", [{}])[0]
        linears = [
            entry
            for entry in parts.get("linears", [])
            if (entry["level"], entry.get("dtype", "bfloat16")) == (first["level"], "bfloat16")
        ]
        if linears:
            sizes = [min(e["times_smaller"] for e in linears if e["sparsity"] == s) for s in sparsities]
            lines.append("| pruned Linears, times smaller | " + " | ".join(f"{size:.2f}" for size in sizes) + " |")
        for shape in dict.fromkeys(tuple(entry["shape"]) for entry in linears):
            cells = [
                f"{e['faster_than_torch']:.1f} ({e['faster_than_dense_kernel']:.1f})"
                for e in linears
                if tuple(e["shape"]) == shape
            ]
            name = f"one token, {shape[0]} x {shape[1]}: times as fast as torch (as a dense kernel)"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        model = {entry["sparsity"]: entry for entry in parts.get("model", [])}
        if model:
            cells = [f"{model[s]['faster_than_torch']:.1f}" if s in model else "" for s in sparsities]
            lines.append("| tokens per second, Llama of 1 B: times torch | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, f"{record['machine']}; {record['kernels']}; {record['date']}"])


def main() -> None:
    """Measure one part and put it into the file, or print the file as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["linears", "tokens", "model"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/packed.json"))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    record = json.loads(options.json.read_text()) if options.json.exists() else {"threads": {}}
    if options.part:
        torch.set_grad_enabled(False)
        parts = record["threads"].setdefault(str(torch.get_num_threads()), {})
        measured = []
        for entry in run_part(options.part, options.sparsity):
            print(json.dumps(entry), flush=True)
            measured.append(entry)
        kept = [entry for entry in parts.get(options.part, []) if entry["sparsity"] not in options.sparsity]
        parts[options.part] = kept + measured
        record |= {
            "machine": machine(argparse.Namespace(device="cpu", threads=1)).replace(", 1 thread", ""),
            "kernels": kernel_report(),
            "date": date.today().isoformat(),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        print(markdown(record))


if __name__ == "__main__":
    main()
