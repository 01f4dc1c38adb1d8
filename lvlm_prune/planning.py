"""What a run would do and need, said before it is done: `lvlm-prune prune --plan true`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.module import LVLMModule


@dataclass(frozen=True)
class PlannedLinear:
    """One Linear that would be pruned.

    Args:
        name: Full module path.
        keys: Names on disk of the tensors that hold its weight.
        shape: (C_out, C_in).
        target: Target sparsity.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, int]
    target: float


@dataclass(frozen=True)
class Plan:
    """What would be pruned, and what that needs.

    Args:
        linears: The Linears, in the order of the blocks.
        weights: Number of weights in all blocks' Linears that would be pruned.
        model_weights: Number of weights of the whole checkpoint.
        frame_bytes: Weights in memory while samples are caught: towers, embeddings, no block.
        block_bytes: Weights of the largest block in memory.
        sample_bytes: Hidden states of all calibration samples at the input of a block; None where no data is needed.
        disk_bytes: Size of the output folder.
    """

    linears: tuple[PlannedLinear, ...]
    weights: int
    model_weights: int
    frame_bytes: int
    block_bytes: int
    sample_bytes: int | None
    disk_bytes: int

    def __str__(self) -> str:
        keys = [", ".join(linear.keys) for linear in self.linears]
        width = max(map(len, keys))
        lines = [
            f"{key:{width}}  {linear.shape[0]:>7} x {linear.shape[1]:<7} {linear.target:.4f}"
            for key, linear in zip(keys, self.linears)
        ]
        share = self.weights / max(self.model_weights, 1)
        zeros = sum(prod(linear.shape) * linear.target for linear in self.linears)
        lines.append(
            f"{len(self.linears)} Linears · {self.weights:,} weights, {100 * share:.1f}% of the checkpoint's "
            f"{self.model_weights:,} · about {zeros:,.0f} zeros"
        )
        lines.append(
            f"weights in memory: {_size(self.frame_bytes)} while samples are caught, then one block at a time,"
        )
        lines.append(f"{_size(self.block_bytes)} at most")
        if self.sample_bytes is not None:
            lines.append(f"hidden states of the calibration samples: {_size(self.sample_bytes)}")
        lines.append(f"disk: {_size(self.disk_bytes)} for the output folder")
        return "\n".join(lines)


def make_plan(
    module: LVLMModule,
    weights: StreamedWeights,
    targets: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    tokens: Iterable[int] | None,
) -> Plan:
    """Look at a model on the meta device; no weights are read.

    Args:
        module: The opened model.
        weights: Knows which tensors on disk hold a parameter.
        targets: Full name of each Linear to prune -> target sparsity.
        shapes: Full name of each Linear to prune -> (C_out, C_in).
        tokens: Number of tokens of each calibration sample; None where the method needs no data.
    """
    assert module.folder is not None
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in module.model.state_dict().items()}
    blocks = [
        sum(size for name, size in sizes.items() if name.startswith(f"{module.runner.name(index)}."))
        for index in range(len(module.runner))
    ]
    output = module.model.get_output_embeddings()
    unused = sum(parameter.numel() * parameter.element_size() for parameter in output.parameters()) if output else 0
    tied = output is not None and output.weight is module.model.get_input_embeddings().weight
    width = module.model.config.get_text_config(decoder=True).hidden_size
    itemsize = torch.empty((), dtype=module.compute_dtype).element_size()
    return Plan(
        linears=tuple(
            PlannedLinear(name, tuple(weights.keys_of(f"{name}.weight")), shapes[name], target)
            for name, target in targets.items()
        ),
        weights=sum(prod(shapes[name]) for name in targets),
        model_weights=sum(prod(tensor.shape) for tensor in module.folder.tensors.values()),
        frame_bytes=sum(sizes.values()) - sum(blocks) - (0 if tied else unused),
        block_bytes=max(blocks),
        sample_bytes=None if tokens is None else sum(tokens) * width * itemsize,
        disk_bytes=sum(path.stat().st_size for path in module.folder.path.rglob("*") if path.is_file()),
    )


def _size(count: int) -> str:
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
