"""What a run would do and need, said before it is done: `lvlm-prune prune --plan true`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

from lvlm_prune.blocks import Place, StreamedWeights
from lvlm_prune.memory.footprint import Footprint
from lvlm_prune.memory.sizes import Peak, larger_phases
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.units import readable_percent, readable_size


@dataclass(frozen=True)
class PlannedLinear:
    """One Linear, or one tensor on disk that holds matrices of routed experts, that would be pruned.

    Args:
        name: Full module path.
        keys: Names on disk of the tensors that hold its weight.
        shape: (C_out, C_in); of a stack of experts the shape on disk.
        target: Target sparsity; of a stack of experts their mean.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    target: float


@dataclass(frozen=True)
class Plan:
    """What would be pruned, and what that needs.

    Args:
        linears: The Linears, in the order of the blocks.
        weights: Number of weights in all blocks' Linears that would be pruned.
        model_weights: Number of weights of the whole checkpoint.
        phases: What each phase of the run takes in memory beside the samples and the libraries, in bytes.
        held_bytes: Hidden states, and what else belongs to the calibration samples; 0 where no data is needed.
        place: Where these wait.
        peak: The most memory and disk at any time.
        output_bytes: Size of the output folder.
        baseline: Memory of the libraries, part of the host's.
        free_bytes: What is free on the disk of the output folder.
        surveys: What looks at the dense model first, and what that takes, a line each.
    """

    linears: tuple[PlannedLinear, ...]
    weights: int
    model_weights: int
    phases: Mapping[str, int]
    held_bytes: int
    place: Place
    peak: Peak
    output_bytes: int
    baseline: int
    free_bytes: int
    surveys: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.weights / max(self.model_weights, 1)
        zeros = sum(prod(linear.shape) * linear.target for linear in self.linears)
        lines = [
            f"{len(self.linears)} Linears · {self.weights:,} weights, {100 * share:.1f}% of the checkpoint's "
            f"{self.model_weights:,} · about {zeros:,.0f} zeros"
        ]
        phases = ", ".join(f"{name} {readable_size(count)}" for name, count in self.phases.items())
        lines.append(f"memory beside libraries and samples: {phases}")
        if self.held_bytes:
            device = "on the device" if self.peak.device is not None else "in memory"
            where = {"device": device, "host": "in host memory", "disk": "in memory-mapped files"}[self.place]
            lines.append(f"hidden states of the calibration samples: {readable_size(self.held_bytes)} {where}")
        device = "" if self.peak.device is None else f"{readable_size(self.peak.device)} on the device, "
        lines.append(
            f"predicted peak: {device}{readable_size(self.peak.host)} of host memory "
            f"({readable_size(self.baseline)} of it libraries), {readable_size(self.peak.disk)} of disk "
            f"({readable_size(self.output_bytes)} of it the output folder, where "
            f"{readable_size(self.free_bytes)} are free)"
        )
        return "\n".join([*lines, *self.surveys, *self._kinds()])

    def _kinds(self) -> Iterator[str]:
        """A line for each kind of Linear: its name with `*` for numbers, how many of which shape, target sparsity."""
        kinds: dict[tuple[str, tuple[int, ...]], list[float]] = {}
        for linear in self.linears:
            name = re.sub(r"\.\d+(?=\.)", ".*", ", ".join(linear.keys))
            kinds.setdefault((name, linear.shape), []).append(linear.target)
        width = max(len(name) for name, _ in kinds)
        for (name, shape), targets in kinds.items():
            bounds = dict.fromkeys(map(readable_percent, (min(targets), max(targets))))
            written = " x ".join(f"{length:>7}" for length in shape)
            yield f"{name:{width}} {len(targets):>5} of {written:>17}  {' to '.join(bounds)}"


def make_plan(
    module: LVLMModule,
    weights: StreamedWeights,
    targets: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    footprints: Sequence[tuple[Footprint, Place]],
    free_bytes: int,
    surveys: Sequence[str],
) -> Plan:
    """Look at a model on the meta device; no weights are read.

    Args:
        module: The opened model.
        weights: Knows which tensors on disk hold a parameter.
        targets: Full name of each Linear to prune -> target sparsity.
        shapes: Full name of each Linear to prune -> (C_out, C_in).
        footprints: For each part of the model that is pruned, what predicts the memory, and where the samples wait.
        free_bytes: What is free on the disk of the output folder.
        surveys: What looks at the dense model first, a line each.
    """
    assert module.folder is not None
    phases: dict[str, int] = {}
    for footprint, _ in footprints:
        phases = larger_phases(phases, footprint.phases())
    footprint, place = max(footprints, key=lambda pair: pair[0].held_bytes())
    return Plan(
        linears=tuple(_planned(module, weights, targets, shapes)),
        weights=sum(prod(shapes[name]) for name in targets),
        model_weights=sum(prod(tensor.shape) for tensor in module.folder.tensors.values()),
        phases=phases,
        held_bytes=footprint.held_bytes(),
        place=place,
        peak=reduce(Peak.or_more, (each.peak(where) for each, where in footprints)),
        output_bytes=footprint.output_bytes,
        baseline=footprint.baseline,
        free_bytes=free_bytes,
        surveys=tuple(surveys),
    )


def _planned(
    module: LVLMModule, weights: StreamedWeights, targets: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]
) -> Iterator[PlannedLinear]:
    assert module.folder is not None
    experts = {name: matrix.parameter_of(name) for name, matrix in module.expert_matrices().items()}
    stacks: dict[str, list[float]] = {}
    for name, target in targets.items():
        if name in experts:
            stacks.setdefault(experts[name], []).append(target)
        else:
            yield PlannedLinear(name, tuple(weights.keys_of(f"{name}.weight")), shapes[name], target)
    for parameter, own in stacks.items():
        for key in weights.keys_of(parameter):
            yield PlannedLinear(parameter, (key,), module.folder[key].shape, sum(own) / len(own))
