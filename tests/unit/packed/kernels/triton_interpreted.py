"""A process of its own for Triton's interpreter, which TRITON_INTERPRET=1 turns on before Triton is imported.

Prints the largest error of each product, in units of what rounding allows, and ends with status 1 where one is above 1.
"""

import sys

import torch

from lvlm_prune.packed.kernels import bitmask, gpu
from tests.unit.packed.kernels.matrices import same_bits, sparse


def excess(result, x, dense, bias) -> float:
    """Largest difference from a product in float64, over what rounding to the result's dtype allows."""
    exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    scale = x.double().abs() @ dense.double().abs().T
    # The interpreter cuts floats off to bfloat16 instead of rounding them.
    unit = torch.finfo(result.dtype).eps / (1 if result.dtype == torch.bfloat16 else 2)
    allowed = 1.001 * unit * exact.abs() + 1e-6 * scale + 1e-7
    return float(((result.double() - exact).abs() / allowed).max())


def main() -> int:
    torch.manual_seed(0)
    worst = 0.0
    cases = [
        (33, 300, torch.bfloat16, torch.bfloat16, (1, 3, 7)),
        (16, 256, torch.float16, torch.float16, (2, 20)),
        (40, 520, torch.float32, torch.float32, (4, 70)),
        (17, 65, torch.bfloat16, torch.float32, (1, 16)),
    ]
    for rows, columns, dtype, x_dtype, numbers in cases:
        dense = sparse(rows, columns, 0.6, dtype)
        dense[3], dense[1, 2] = 0, -0.0
        values, mask = bitmask.pack_rows(dense)
        words, start = gpu.lay_out(mask)
        assert same_bits(gpu.row_mask(words, columns), mask)
        assert same_bits(gpu.unpack(values, words, start, rows, columns), dense)
        for tokens in numbers:
            x, bias = torch.randn(tokens, columns).to(x_dtype), torch.randn(rows).to(x_dtype)
            for given in (None, bias):
                error = excess(gpu.linear(x, values, words, start, given, rows), x, dense, given)
                print(f"{rows} x {columns} {dtype} {x_dtype} {tokens} tokens: {error:.2f}")
                worst = max(worst, error)
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
