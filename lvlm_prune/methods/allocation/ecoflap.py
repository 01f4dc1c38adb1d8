"""ECoFLaP: Linears to which the loss is more sensitive keep more, measured without any gradient.

W + eps z ─► loss ┐
                  ├─► |difference| / 2 eps      for each Linear and sample, from the cached input of its block on
W - eps z ─► loss ┘
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.methods.allocation.base import block_of
from lvlm_prune.methods.allocation.water_filling import WaterFillingAllocation
from lvlm_prune.methods.survey import Change, RemainingBlocks, SumOverProcesses, SurveyCost


class ECoFLaPAllocation(WaterFillingAllocation):
    r"""Sparsity from zeroth-order sensitivity of the loss (ECoFLaP, ICLR 2024).

    .. math:: c_l = \sum_{samples} \frac{|L(W_l + \epsilon z) - L(W_l - \epsilon z)|}{2 \epsilon}, \quad
              z \sim \mathcal N(0, 1)

    with one noise per sample and Linear, and L the mean next-token loss over the text tokens of the calibration sample.
    The kept weights are dealt out by water-filling over the attention and the MLP of each block, in proportion to the
    sum of their Linears' scores.

    For B blocks of n Linears it costs n B (B + 1) block forwards and 2 n B losses per sample, which is printed before
    it starts. A checkpoint that streams from disk is read about B / 2 times more, or a multiple of that where the
    hidden states of all samples do not fit into 4 GB. Noise is drawn on the CPU, the same whatever device computes.

    Args:
        epsilon: Standard deviation of the noise.
        samples: How many of the calibration samples to take, drawn from them; all if there are fewer.
        seed: Another seed draws other noise.
        max_sparsity: Largest sparsity that a group may get. Default: 0.1 above the target.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> allocation = ECoFLaPAllocation()
        >>> allocation.use_survey({"importance": {"0.attn.q_proj": 3.0, "0.mlp.up_proj": 1.0}})
        >>> shapes = {"0.attn.q_proj": (10, 10), "0.mlp.up_proj": (10, 10)}
        >>> {name: round(value, 3) for name, value in allocation.allocate(shapes, 0.5).items()}
        {'0.attn.q_proj': 0.45, '0.mlp.up_proj': 0.55}
    """

    wants_survey = True
    wants_survey_losses = True

    def __init__(
        self, epsilon: float = 1e-3, samples: int = 16, seed: int = 0, max_sparsity: float | None = None
    ) -> None:
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"`epsilon` {epsilon}: must be a finite number larger than 0")
        if samples < 1:
            raise ValueError(f"`samples` {samples}: must be at least 1")
        if seed < 0:
            raise ValueError(f"`seed` {seed}: must not be negative")
        self.epsilon = epsilon
        self.samples = self.survey_samples = samples
        self.seed = seed
        super().__init__(max_sparsity)
        self._sums: dict[str, float] = {}
        self._importance: dict[str, float] = {}

    def survey_cost(self, linears: Mapping[str, list[str]], samples: int) -> SurveyCost:
        """Each Linear moved there and back, through its block and those after it."""
        changes = [2 * len(names) for names in linears.values()]
        forwards = sum(count * (len(changes) - index) for index, count in enumerate(changes))
        return SurveyCost(samples * forwards, samples * sum(changes))

    def survey_bytes(self, shapes: Mapping[str, tuple[int, int]], itemsize: int, on_gpu: bool = False) -> int:
        """See `Surveyor.survey_bytes`: one weight in float32 with its noise, before and after, and the new one."""
        return max((rows * columns * (12 + itemsize) for rows, columns in shapes.values()), default=0)

    def survey_block_start(self, block: str, linears: Mapping[str, nn.Linear], remaining: RemainingBlocks) -> None:
        """Losses of each sample with each Linear of the block moved there and back."""
        changes: list[Change] = [
            partial(self._moved, linear.weight, f"{block}.{name}", direction)
            for name, linear in linears.items()
            for direction in (1, -1)
        ]
        for losses in remaining.losses(changes).values():
            for name, above, below in zip(linears, losses[::2], losses[1::2]):
                key = f"{block}.{name}"
                self._sums[key] = self._sums.get(key, 0.0) + abs(above - below) / (2 * self.epsilon)

    @contextmanager
    def _moved(self, weight: Tensor, name: str, direction: int, sample: int) -> Iterator[None]:
        """The weight with this sample's noise on it; afterwards the very same weight again."""
        digest = hashlib.sha256(f"{self.seed}/{name}/{sample}".encode()).digest()
        # Drawn on the CPU: a GPU's generator would give other numbers, and with them other masks.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        dense = weight.data
        noise = torch.randn(dense.shape, generator=generator, dtype=torch.float32).to(dense.device)
        weight.data = (dense.float() + direction * self.epsilon * noise).to(dense.dtype)
        try:
            yield
        finally:
            weight.data = dense

    def survey_block_end(
        self, block: str, linears: Mapping[str, nn.Linear], sum_over_processes: SumOverProcesses
    ) -> None:
        """Sum over the samples of all processes."""
        names = [f"{block}.{name}" for name in linears]
        sums = torch.tensor([self._sums.pop(name, 0.0) for name in names], dtype=torch.float64)
        self._importance.update(zip(names, sum_over_processes(sums).tolist()))

    def survey_so_far(self) -> dict[str, Any]:
        """Importance of each Linear of the finished blocks."""
        return {"importance": self._importance}

    def survey_end(self, sum_over_processes: SumOverProcesses) -> dict[str, Any]:
        """`importance`: full name of each Linear -> its importance, for the record."""
        return self.survey_so_far()

    def use_survey(self, findings: Mapping[str, Any]) -> None:
        """Take the importance of each Linear from what the survey found."""
        self._importance = dict(findings["importance"])

    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """Water-filling over the attention and the MLP of each block."""
        groups = {name: f"{block_of(name)}/{'attention' if in_attention(name) else 'MLP'}" for name in shapes}
        scores = {name: self._importance[name] for name in shapes}
        return self.fill(scores, shapes, groups, sparsity)


def in_attention(name: str) -> bool:
    """Whether a Linear belongs to its block's attention, or to what stands in for it (`linear_attn`, `mixer`)."""
    inside = name.removeprefix(block_of(name))
    return any(word in inside for word in ("attn", "attention", "mixer"))
