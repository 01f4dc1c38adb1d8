"""Budgets of different saliencies made comparable: the same total number of visual tokens on the dense model.

Attention is of the order of one over the number of tokens, drift of a tenth: at the same alpha they would buy very
different numbers of tokens. Table 3 of arXiv 2603.16001 compares them at equal totals.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lvlm_prune.methods.survey import SumOverProcesses

# Halvings of the interval that holds the factor: more than a float can tell apart.
_HALVINGS = 60


class MatchedTotal:
    """One factor on the mean saliency of every block, such that the total number of visual tokens equals another's.

    Args:
        budget: Number of visual tokens for (mean saliency, text tokens, visual tokens) of a sample.

    Example:
        >>> matched = MatchedTotal(lambda mean, num_text, num_visual: min(num_visual, int(mean * num_text)))
        >>> matched.add(torch.tensor([0.01, 0.03]), torch.tensor([0.2, 0.4]), num_text=20)
        >>> matched.end_block(lambda values: values)
        >>> factor, total, reference = matched.end(lambda values: values)
        >>> round(factor, 3), total, reference
        (5.0, 2, 2)
    """

    def __init__(self, budget: Callable[[float, int, int], int]) -> None:
        self._budget = budget
        self._blocks: list[tuple[float, float, list[tuple[int, int]]]] = []
        self._start_block()

    def _start_block(self) -> None:
        self._sums: list[Tensor] = []
        self._sizes: list[tuple[int, int]] = []

    def add(self, saliency: Tensor, reference: Tensor, num_text: int) -> None:
        """One sample at the block: both saliencies of its visual tokens, of shape (n_visual,)."""
        self._sums.append(torch.stack([saliency.double().sum(), reference.double().sum()]))
        self._sizes.append((num_text, len(saliency)))

    def end_block(self, sum_over_processes: SumOverProcesses) -> None:
        """All samples of all processes went through the block."""
        sums = torch.zeros(3, dtype=torch.float64)
        if self._sums:  # else this process has no sample of the survey
            sums[:2], sums[2] = torch.stack(self._sums).sum(0).cpu(), sum(visual for _, visual in self._sizes)
        total, reference, count = sum_over_processes(sums).tolist()
        self._blocks.append((total / max(count, 1), reference / max(count, 1), self._sizes))
        self._start_block()

    def end(self, sum_over_processes: SumOverProcesses) -> tuple[float, int, int]:
        """The factor, the total number of visual tokens with it, and that of the reference.

        The total is a step function of the factor, so the two may differ where several samples step at once; the
        nearer side of that step is taken.
        """

        def total_of(means: list[float]) -> int:
            local = sum(self._budget(mean, *size) for mean, (_, _, sizes) in zip(means, self._blocks) for size in sizes)
            return round(sum_over_processes(torch.tensor([float(local)], dtype=torch.float64)).item())

        def total(factor: float) -> int:
            return total_of([factor * mean for mean, _, _ in self._blocks])

        wanted = total_of([reference for _, reference, _ in self._blocks])
        means, references = sum(block[0] for block in self._blocks), sum(block[1] for block in self._blocks)
        if means <= 0:
            return 1.0, 0, wanted
        start = references / means or 1.0
        low, high = 0.0, start
        # With nothing wanted, the first token that would be too many still bounds the factor from above.
        enough = max(wanted, 1)
        for _ in range(_HALVINGS):
            if total(high) >= enough:
                break
            low, high = high, 2 * high
        else:
            return start, total(start), wanted
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if total(middle) >= enough else (middle, high)
        below, above = total(low), total(high)
        return (low, below, wanted) if wanted - below < above - wanted else (high, above, wanted)
