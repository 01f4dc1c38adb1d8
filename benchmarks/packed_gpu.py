"""How long packed matrices take on a GPU beside torch's dense ones, as ratios.

    python -m benchmarks.packed_gpu --json OUT [--device cuda]

Both go over copies of the weights that no cache holds together; a ratio is dense over packed, of medians. On a CPU the
script runs too, to be tried; `benchmarks/packed.py` is the benchmark there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.prune_speed import machine
from lvlm_prune.packed.kernels import PackedMatrix, kernel_report, packed_linear

SHAPES = [(4096, 14336), (4096, 4096), (18944, 3584)]
SPARSITIES = [0.5, 0.6, 0.7]
TOKENS = [1, 16]
BEYOND_CACHES = 2**28
"""Bytes of dense weights that a measurement goes through before it comes back to the first."""


def random_weight(shape: tuple[int, int], sparsity: float, device: str) -> Tensor:
    """A bfloat16 weight with zeros anywhere."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape, generator=generator) >= sparsity
    return (torch.randn(shape, generator=generator) * kept).bfloat16().to(device)


def milliseconds(
    product: Callable[[Tensor, Any], Tensor], x: Tensor, weights: Sequence[Any], repetitions: int
) -> float:
    """Median over repetitions of one product, each with the next copy of the weight."""
    seconds = []
    for repetition in range(repetitions + 3):
        if x.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        product(x, weights[repetition % len(weights)])
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[3:])  # the first ones compile


def measured(shape: tuple[int, int], sparsity: float, options: argparse.Namespace) -> dict[str, Any]:
    """One shape at one sparsity."""
    weight = random_weight(shape, sparsity, options.device)
    copies = max(min(BEYOND_CACHES // weight.nbytes, 16), 1) if options.device == "cuda" else 1
    dense = [weight.clone() for _ in range(copies)]
    packed = [PackedMatrix.from_dense(weight.cpu()).to(options.device) for _ in range(copies)]
    entry: dict[str, Any] = {"shape": list(shape), "sparsity": sparsity, "faster": {}, "dense_ms": {}}
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=options.device)
        torch.testing.assert_close(packed_linear(x, packed[0]), linear(x, weight), rtol=0.05, atol=0.5)
        slow = milliseconds(linear, x, dense, options.repetitions)
        fast = milliseconds(packed_linear, x, packed, options.repetitions)
        entry["dense_ms"][str(tokens)], entry["faster"][str(tokens)] = slow, slow / fast
    return entry


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--small", action="store_true", help="one small shape, to try the script")
    options = parser.parse_args()
    shapes = [(64, 512)] if options.small else SHAPES
    entries = []
    for shape in shapes:
        for sparsity in SPARSITIES:
            entries.append(measured(shape, sparsity, options))
            print(json.dumps(entries[-1]), flush=True)
    machine_name = machine(argparse.Namespace(device=options.device, threads=torch.get_num_threads()))
    record = {"machine": machine_name, "kernels": kernel_report(), "products": entries}
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
