"""Sizes that are known before a run starts: of its batches, of what its method holds; and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lvlm_prune.blocks import modality_of_tokens, with_image_positions
from lvlm_prune.methods.modality import MODALITIES
from lvlm_prune.methods.pools import Pool
from lvlm_prune.methods.solvers import Solver
from lvlm_prune.methods.survey import Surveyor

# Elements that become one patch of a vision tower: 14 x 14 pixels of three colours.
_PATCH = 588


@dataclass(frozen=True)
class BatchSize:
    """Size of one calibration batch.

    Args:
        shape: (samples, positions).
        text: Text tokens of each sample.
        visual: Visual tokens of each sample.
        input_elements: Elements of all floating-point inputs (pixels).
    """

    shape: tuple[int, int]
    text: tuple[int, ...]
    visual: tuple[int, ...]
    input_elements: int

    @property
    def positions(self) -> int:
        """Positions in all samples, padding included."""
        return prod(self.shape)

    @property
    def patches(self) -> int:
        """About how many patches a vision tower makes of the inputs."""
        return self.input_elements // _PATCH

    def in_tower(self, patches: int) -> BatchSize:
        """Size of what a vision tower sees of a batch of one sample: patches, each a visual token."""
        return BatchSize((1, patches), (0,), (patches,), self.input_elements)

    def samples_in_tower(self) -> list[BatchSize]:
        """About the same for each sample of a batch, before any tower has run; none for text."""
        samples = self.shape[0]
        one = replace(self, input_elements=self.input_elements // samples)
        return [one.in_tower(one.patches)] * samples if one.patches else []

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], config: object, visual: Sequence[str]) -> BatchSize:
        """Size of model inputs; `visual` are the modalities that count as visual."""
        input_ids, attention_mask = with_image_positions(config, inputs)
        assert input_ids is not None
        modality = modality_of_tokens(config, input_ids, attention_mask)
        codes = torch.tensor([MODALITIES[name] for name in visual], dtype=modality.dtype, device=modality.device)
        return cls(
            (input_ids.shape[0], input_ids.shape[1]),
            tuple((modality == MODALITIES["text"]).sum(1).tolist()),
            tuple(torch.isin(modality, codes).sum(1).tolist()),
            sum(value.numel() for value in inputs.values() if value.is_floating_point()),
        )


@dataclass(frozen=True)
class MemoryDemand:
    """What takes memory of a method: its plugins, and whether it surveys the dense model.

    Args:
        pool: Chooses tokens; None where no activations are gathered.
        solver: Finds masks and new weights.
        needs: What is recorded of a forward besides the inputs of the Linears.
        surveys: Whether the dense model is surveyed.
        surveyors: The plugins that survey it.
        survey_needs: As `needs`, in the survey.
        prunes_experts: Whether routed experts are pruned, each from a statistic of its own.
        follows_dense: Whether the samples go through the dense model too, beside the pruned one.
        by_site: Whether the sites of a block are calibrated one after the other.
    """

    pool: Pool | None
    solver: Solver
    needs: frozenset[str]
    surveys: bool
    surveyors: tuple[Surveyor, ...]
    survey_needs: frozenset[str]
    prunes_experts: bool
    follows_dense: bool = False
    by_site: bool = False


@dataclass(frozen=True)
class Peak:
    """Bytes.

    Args:
        device: Memory of the GPU; None on a CPU, whose memory is the host's.
        host: Anonymous memory of the process, libraries included.
        disk: The output folder and memory-mapped files.
    """

    device: int | None
    host: int
    disk: int

    def or_more(self, other: Peak) -> Peak:
        """The larger of both, each kind of memory by itself."""
        device = None if self.device is None or other.device is None else max(self.device, other.device)
        return Peak(device, max(self.host, other.host), max(self.disk, other.disk))


def larger_phases(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """Phases of both, with the larger number where both have one."""
    return {**first, **{name: max(count, first.get(name, 0)) for name, count in second.items()}}
