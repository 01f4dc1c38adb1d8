"""The asymmetric pool of ATV-Pruning: all text tokens and a block-adaptive number of salient visual ones.

    text tokens      ████████████████          count in any case
    visual tokens    █▇▆▅▄▃▂▁┊▁▁▁▁▁▁▁          ranked by saliency; the first K count
                             K = floor(alpha * mean saliency of the block * number of text tokens)

The mean is over all samples, so K is known only when the last sample has run. The ranking is known at once, so every
sample runs once and hands over its candidates, best first.
"""

import math
from typing import Literal

import torch
from jsonargparse import lazy_instance

from lvlm_prune.errors import InputError
from lvlm_prune.pools.base import Pool, SumOverProcesses
from lvlm_prune.saliency import DriftSaliency, Saliency
from lvlm_prune.tokens import Selection, Tokens


class AsymmetricPool(Pool):
    r"""All text tokens and the K most salient visual tokens of each sample (arXiv 2603.16001, Eqs. 2 to 7).

    .. math:: K = \lfloor \alpha \, \bar s \, n_{text} \rfloor

    with :math:`\bar s` the mean saliency over all visual tokens of all samples at this block.

    Args:
        saliency: How visual tokens are ranked and how large the budget is.
        alpha: Scale of the budget; 1.0 for LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL and N:M, 1.5 for Qwen2-VL.
        rounding: `floor` is the paper's Eq. 6; `released` is the authors' code,
            `min(n_visual, round(min(1, alpha * mean) * n_text))` with banker's rounding.

    Raises:
        InputError: `alpha` is negative or not finite, `rounding` unknown.
    """

    def __init__(
        self,
        saliency: Saliency = lazy_instance(DriftSaliency),
        alpha: float = 1.0,
        rounding: Literal["floor", "released"] = "floor",
    ) -> None:
        if not (math.isfinite(alpha) and alpha >= 0):
            raise InputError("pruning.pool.alpha", alpha, "must be a finite number, 0 or larger")
        if rounding not in ("floor", "released"):
            raise InputError("pruning.pool.rounding", rounding, "must be `floor` or `released`")
        self.saliency = saliency
        self.needs = saliency.needs
        self.alpha = alpha
        self.rounding = rounding
        self._mean = 0.0
        self._start_block()

    def _start_block(self) -> None:
        self._total, self._count = 0.0, 0
        self._sizes: list[tuple[int, int]] = []

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Text tokens in any case; visual tokens as candidates, most salient first."""
        saliency = self.saliency(tokens)
        self._total += saliency.double().sum().item()
        self._count += len(saliency)
        self._sizes.append((tokens.num_text, len(saliency)))
        # K can never exceed this, so no more candidates need to be held until the mean is known.
        most = self._budget(self.saliency.maximum, *self._sizes[-1])
        ranking = self.saliency.ranking(tokens, saliency)[:most]
        return Selection(tokens.text, tokens.visual.nonzero().flatten()[ranking], saliency)

    def cutoffs(self, sum_over_processes: SumOverProcesses) -> list[int]:
        """K of each sample, once the mean saliency over all samples of all processes is known."""
        total, count = sum_over_processes(torch.tensor([self._total, self._count], dtype=torch.float64)).tolist()
        self._mean = total / max(count, 1)
        budgets = [self._budget(self._mean, *size) for size in self._sizes]
        self._start_block()
        return budgets

    def _budget(self, mean: float, num_text: int, num_visual: int) -> int:
        if math.isinf(mean):
            return num_visual
        if self.rounding == "released":
            return min(num_visual, round(min(1.0, self.alpha * mean) * num_text))
        return min(num_visual, math.floor(self.alpha * mean * num_text))

    def summary(self) -> dict[str, float]:
        """Mean saliency of the block just ended, under the name of the saliency (`mean_drift`)."""
        return {f"mean_{self.saliency.name}": self._mean}
