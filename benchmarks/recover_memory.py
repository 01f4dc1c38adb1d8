"""Bytes that one adapted Linear keeps for backward: sparse LoRA, plain LoRA, and the masked product left to autograd.

    python benchmarks/recover_memory.py --width 2048 --out 8192 --rank 16 --tokens 512

Counted are tensors saved by autograd that live nowhere else: not the input, the frozen weight or the adapter.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from lvlm_prune.recovery import masked_lora_linear

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def sparse_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The project's function."""
    return masked_lora_linear(x, weight, None, a, b, scale)


def straight_through(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The project's function with gradients that leave the mask out."""
    return masked_lora_linear(x, weight, None, a, b, scale, gradient="straight_through")


def plain_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """LoRA as PEFT computes it; merging it destroys the zeros."""
    return linear(x, weight) + linear(linear(x, a), b) * scale


def naive_product(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same function as `sparse_lora`, left to autograd."""
    return linear(x, weight + (weight != 0) * (b @ a) * scale)


def measure(forward: Forward, out: int, width: int, rank: int, tokens: int, repeats: int) -> tuple[int, float]:
    """Bytes kept for backward, and the least processor seconds of a forward and backward."""
    torch.manual_seed(0)
    weight = torch.randn(out, width)
    weight[torch.rand_like(weight) < 0.5] = 0.0
    x = torch.randn(tokens, width, requires_grad=True)
    a, b = torch.randn(rank, width, requires_grad=True), torch.randn(out, rank, requires_grad=True)
    alive = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, a, b)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(x, weight, a, b, 2.0)
    del output
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        forward(x, weight, a, b, 2.0).sum().backward()
        seconds.append(time.process_time() - start)
    return sum(kept.values()), min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=int, default=2048)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = vars(parser.parse_args())
    print(f"{'':18}{'kept for backward':>18}{'forward + backward':>22}")
    for forward in (sparse_lora, straight_through, plain_lora, naive_product):
        kept, seconds = measure(forward, **options)
        print(f"{forward.__name__:18}{kept / 2**20:14.2f} MiB{1000 * seconds:19.1f} ms")


if __name__ == "__main__":
    main()
