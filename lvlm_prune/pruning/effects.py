"""What pruning does to the Linears of a block: how far their outputs move, and which scores go.

score   ▁▂▅▇█▇▅▂▁      scores of all weights of the block, in steps of a tenth of a decade
        ░░░░│▓▓▓▓▓     ░ went  ▓ stayed  │ threshold, the largest score of a row that went: it differs from row to row

All numbers stay on the device until the block is done.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.statistics import Statistic

BINS_PER_DECADE = 10
_LOWEST, _BINS = -16 * BINS_PER_DECADE, 32 * BINS_PER_DECADE
# Scores of so many weights of a Linear describe their distribution; taking logarithms of all would cost time.
_WEIGHTS_LOOKED_AT = 2**17
# Rows of a Linear with so many weights describe its error; with Gram matrices all rows would take a tenth of a solve.
_WEIGHTS_OF_ERROR = 2**18


class PruningErrors:
    """Collects what happened to the Linears of a block.

    Example:
        >>> effects = PruningErrors()
        >>> weight, score = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 200.0]])
        >>> effects.add("up_proj", weight, torch.tensor([[0.0, 2.0]]), torch.tensor([[True, False]]), None, score)
        >>> effects.scores()
        {'first': 0, 'pruned': [1, 0, 0, ..., 0], 'kept': [0, 0, 0, ..., 1], 'threshold': [1.0, 1.0, 1.0]}
    """

    def __init__(self) -> None:
        self._errors: dict[str, tuple[Tensor, Tensor]] = {}
        self._counts: Tensor | None = None
        self._thresholds: list[Tensor] = []

    def add(
        self,
        name: str,
        before: Tensor,
        after: Tensor,
        mask: Tensor,
        statistic: Statistic | None,
        score: Tensor,
    ) -> None:
        """Add one Linear.

        Args:
            name: Its full name.
            before: Its dense weight, shape (C_out, C_in).
            after: Its pruned weight, same shape.
            mask: True where pruned, bool of shape (C_out, C_in).
            statistic: Sums over the pool of its input; None where there are none.
            score: Importance of each weight of `scored_rows(before)`.
        """
        if statistic is not None:
            rows = _some(before.shape[0], max(_WEIGHTS_OF_ERROR // before.shape[1], 1))
            dense, changed = before[rows].float(), before[rows].float() - after[rows].float()
            whole, lost = statistic.output_energy(dense), statistic.output_energy(changed)
            if whole is not None and lost is not None:
                self._errors[name] = (lost, whole)
        score, mask = score.float(), mask[scored_rows(before)]
        tenths = (score.clamp(min=1e-30).log10() * BINS_PER_DECADE).floor().clamp(_LOWEST, _LOWEST + _BINS - 1)
        bins = tenths.long() - _LOWEST + _BINS * mask
        counts = _counted(bins.flatten(), 2 * _BINS)
        self._counts = counts if self._counts is None else self._counts + counts
        self._thresholds.append(score.masked_fill(~mask, -torch.inf).amax(dim=1))

    def on_cpu(self) -> PruningErrors:
        """A copy in host memory, to be sent to other processes."""
        return self.of_all([self])

    @classmethod
    def of_all(cls, parts: Sequence[PruningErrors]) -> PruningErrors:
        """What was collected in several parts, each about other Linears."""
        together = cls()
        for part in parts:
            copy = cls()
            copy._errors = {name: (lost.cpu(), whole.cpu()) for name, (lost, whole) in part._errors.items()}
            copy._counts = None if part._counts is None else part._counts.cpu()
            copy._thresholds = [threshold.cpu() for threshold in part._thresholds]
            together.take(copy)
        return together

    def take(self, part: PruningErrors) -> None:
        """Take in what was collected of other Linears of the block, on the same device."""
        self._errors |= part._errors
        if part._counts is not None:
            self._counts = part._counts if self._counts is None else self._counts + part._counts
        self._thresholds += part._thresholds

    def errors(self) -> dict[str, float]:
        r"""Relative reconstruction error of each Linear, full name -> share of the norm of its outputs.

        .. math:: \lVert (W - W') X \rVert_F / \lVert W X \rVert_F
        """
        if not self._errors:
            return {}
        parts = torch.stack([torch.stack(pair) for pair in self._errors.values()])
        return {
            name: (lost / whole) ** 0.5
            for name, (lost, whole) in zip(self._errors, parts.clamp(min=0).tolist())
            if whole > 0
        }

    def scores(self) -> dict[str, Any] | None:
        """Histogram of the scores and their threshold; None where no Linear was pruned.

        Returns:
            `first`: lower edge of the first bin, in tenths of a decade; `pruned` and `kept`: number of weights in each
            bin; `threshold`: 10%, 50% and 90% quantile over rows of the largest score that went.
        """
        if self._counts is None:
            return None
        kept, pruned = self._counts.view(2, _BINS).tolist()
        filled = [index for index in range(_BINS) if kept[index] or pruned[index]]
        first, last = filled[0], filled[-1] + 1
        rows = [value for value in torch.cat(self._thresholds).tolist() if value > -torch.inf]
        deciles = statistics.quantiles(rows, n=10, method="inclusive") if len(rows) > 1 else rows * 9
        return {
            "first": first + _LOWEST,
            "pruned": pruned[first:last],
            "kept": kept[first:last],
            "threshold": [deciles[0], deciles[4], deciles[8]] if deciles else [],
        }


def _counted(values: Tensor, most: int) -> Tensor:
    """How often each number below `most` is there, int64 of shape (most,)."""
    if not values.is_cuda:
        return torch.bincount(values, minlength=most)
    # `bincount` makes a GPU wait: it looks for the largest value first.
    return torch.zeros(most, dtype=torch.int64, device=values.device).index_add_(0, values, torch.ones_like(values))


def scored_rows(weight: Tensor) -> slice:
    """The rows of a weight that describe how its scores are distributed."""
    return _some(weight.shape[0], max(_WEIGHTS_LOOKED_AT // weight.shape[1], 1))


def _some(rows: int, most: int) -> slice:
    """At most `most` rows, evenly spaced."""
    return slice(None, None, -(-rows // most))
