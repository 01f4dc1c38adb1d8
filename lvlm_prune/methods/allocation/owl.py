"""OWL: blocks with many outliers among their Wanda scores keep more."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.methods.allocation.base import Allocation, block_of
from lvlm_prune.methods.survey import SumOverProcesses
from lvlm_prune.methods.tokens import Tokens


class OWLAllocation(Allocation):
    r"""Outlier-weighed sparsity per block (OWL, arXiv 2310.05175).

    .. math:: D_b = \frac{|\{A_{ij} > M \bar A\}|}{|A|}, \quad A_{ij} = |W_{ij}| \, \lVert X_j \rVert_2, \quad
              s_b = s - (\hat D_b - \bar D)

    with the scores :math:`A` of all Linears of the block together, :math:`\hat D` min-max scaled to
    :math:`[0, 2 \lambda]` over blocks and :math:`\bar D` its parameter-weighted mean: **less** sparsity where outliers
    are more, mean exactly s. (TAMP's released OWL has this sign inverted.) All real tokens of the dense model count.

    Args:
        threshold: M, how many times the block's mean a score exceeds to be an outlier.
        width: Lambda, half the distance between the least and the most pruned block.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> allocation = OWLAllocation(width=0.05)
        >>> allocation.use_survey({"outlier_ratio": {"layers.0": 0.03, "layers.1": 0.01}})
        >>> shapes = {"layers.0.q_proj": (10, 10), "layers.1.q_proj": (10, 10)}
        >>> {name: round(value, 3) for name, value in allocation.allocate(shapes, 0.5).items()}
        {'layers.0.q_proj': 0.45, 'layers.1.q_proj': 0.55}
    """

    wants_survey = True

    def __init__(self, threshold: float = 5.0, width: float = 0.08) -> None:
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(f"`threshold` {threshold}: must be a finite number larger than 0")
        if not 0 <= width < 0.5:
            raise ValueError(f"`width` {width}: must be 0 or larger, and less than 0.5")
        self.threshold = threshold
        self.width = width
        self._squares: dict[str, Tensor] = {}
        self._ratios: dict[str, float] = {}

    def survey_sample(self, block: str, tokens: Tokens, inputs: Mapping[str, Tensor]) -> None:
        """Add the squares of each Linear's inputs; Linears that share an input share the sums."""
        sums: dict[int, Tensor] = {}
        for name, values in inputs.items():
            # The views of one site are one object here, alive while the mapping is.
            if id(values) not in sums:
                sums[id(values)] = values.float().square().sum(0).double()
            squares = sums[id(values)]
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

    def survey_block_end(
        self, block: str, linears: Mapping[str, nn.Linear], sum_over_processes: SumOverProcesses
    ) -> None:
        """Outlier ratio of the block, from the inputs on all processes."""
        weights = {name: linear.weight.detach() for name, linear in linears.items()}
        squares = [
            self._squares.get(name, torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device))
            for name, weight in weights.items()
        ]
        self._squares = {}
        if not weights:
            return
        norms = sum_over_processes(torch.cat(squares)).split([len(part) for part in squares])
        # A Linear that saw no calibration token is not pruned, and has no scores.
        scores = [
            weight.float().abs() * norm.sqrt().float() for weight, norm in zip(weights.values(), norms) if norm.any()
        ]
        if scores:
            mean = sum(score.sum(dtype=torch.float64) for score in scores) / sum(score.numel() for score in scores)
            outliers = sum(int((score > self.threshold * mean).sum()) for score in scores)
            self._ratios[block] = outliers / sum(score.numel() for score in scores)

    def survey_end(self, sum_over_processes: SumOverProcesses) -> dict[str, Any]:
        """Outlier ratio of each block, a share."""
        return {"outlier_ratio": self._ratios}

    def use_survey(self, findings: Mapping[str, Any]) -> None:
        """Take the share of outliers of each block from what the survey found."""
        self._ratios = dict(findings["outlier_ratio"])

    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """One sparsity per block.

        Raises:
            ValueError: A block would get a sparsity below 0 or above 1.
        """
        sizes: dict[str, int] = {}
        for name, (rows, columns) in shapes.items():
            sizes[block_of(name)] = sizes.get(block_of(name), 0) + rows * columns
        known = [self._ratios[block] for block in sizes if block in self._ratios]
        mean_ratio = sum(known) / max(len(known), 1)
        ratios = {block: self._ratios.get(block, mean_ratio) for block in sizes}
        low, high = min(ratios.values()), max(ratios.values())
        scaled = {
            block: 2 * self.width * (ratio - low) / (high - low) if high > low else 0.0
            for block, ratio in ratios.items()
        }
        mean = sum(scaled[block] * size for block, size in sizes.items()) / sum(sizes.values())
        found = {block: sparsity - (scaled[block] - mean) for block in sizes}
        least, most = min(found.values()), max(found.values())
        if least < 0 or most > 1:
            problem = f"blocks would get sparsities from {least:.3f} to {most:.3f}; choose a smaller width"
            raise ValueError(f"`width` {self.width}: {problem}")
        return {name: found[block_of(name)] for name in shapes}
