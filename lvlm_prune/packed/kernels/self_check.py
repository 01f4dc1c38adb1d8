"""Whether the kernels of an instruction set compute what they should on this machine; asked once, before they are used.

Instruction sets that the tests never met are met by users: a kernel that errs there is left out instead of used.
"""

import torch
from torch.nn import functional

from lvlm_prune.packed.kernels.linear import packed_linear
from lvlm_prune.packed.kernels.matrix import PackedMatrix

ROWS, COLUMNS = 19, 83  # with tails in both directions
TOKENS = (1, 7, 80)  # packed, some at once, and unpacked in pieces


def agrees() -> bool:
    """Whether small products and unpacked weights of every dtype are those of torch, with the kernels of the moment."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(ROWS, COLUMNS, generator=generator)
    dense[torch.rand(ROWS, COLUMNS, generator=generator) < 0.5] = 0.0
    inputs = torch.randn(max(TOKENS), COLUMNS, generator=generator)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight, x = dense.to(dtype), inputs.to(dtype)
            matrix = PackedMatrix.from_dense(weight)
            if not torch.equal(matrix.to_dense(), weight):
                return False
            expected = functional.linear(x.double(), weight.double())
            for tokens in TOKENS:
                found = packed_linear(x[:tokens], matrix).double()
                if not torch.allclose(found, expected[:tokens], rtol=0.02, atol=0.05):
                    return False
    return True
