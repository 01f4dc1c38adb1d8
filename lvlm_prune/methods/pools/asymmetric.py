"""The asymmetric pool of ATV-Pruning: all text tokens and a block-adaptive number of salient visual ones.

    text tokens      ████████████████          count in any case
    visual tokens    █▇▆▅▄▃▂▁┊▁▁▁▁▁▁▁          ranked by saliency; the first K count
                             K = floor(alpha * mean saliency of the block * number of text tokens)

The mean is over all samples, so K is known only when the last sample has run. The ranking is known at once, so every
sample runs once and hands over its candidates, best first.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lvlm_prune.methods.contract import FLOATS, checked, name_of
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.pools.matching import MatchedTotal
from lvlm_prune.methods.saliency import DriftSaliency, Saliency
from lvlm_prune.methods.saliency.drift import drift
from lvlm_prune.methods.survey import SumOverProcesses
from lvlm_prune.methods.tokens import Selection, Tokens


class AsymmetricPool(Pool):
    r"""All text tokens and the K most salient visual tokens of each sample (arXiv 2603.16001, Eqs. 2 to 7).

    .. math:: K = \lfloor \alpha \, \bar s \, n_{text} \rfloor

    with :math:`\bar s` the mean saliency over all visual tokens of all samples at this block.

    Args:
        saliency: How visual tokens are ranked and how large the budget is. Default: `DriftSaliency`.
        alpha: Scale of the budget; 1.0 for LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL and N:M, 1.5 for Qwen2-VL.
        rounding: `floor` is the paper's Eq. 6; `released` is the authors' code,
            `min(n_visual, round(min(1, alpha * mean) * n_text))` with banker's rounding.
        k: A fixed budget instead of the adaptive one: K visual tokens of each sample at every block, or as many as
            there are (the ablation of Table 3; there K is the mean of the adaptive run's `visual_tokens`).
        text_retention: Share of the text tokens that count, those with the largest drift, rounded to whole tokens (the
            ablation of Fig. 5). The budget of visual tokens follows from all text tokens nevertheless.
        match_total: `drift` multiplies the mean saliency by one factor for the whole run, found in a survey of the
            dense model, such that the total number of visual tokens equals that of drift (Table 3). Both totals are in
            the manifest. Empty: the saliency is taken as it is.
        match_samples: How many of the calibration samples that survey takes, drawn from them. One number is sought from
            all visual tokens of all blocks, so a few samples tell it (on the embedded model 8 of 96 tell the factor
            within 3%); a survey of all would cost half a run.

    Raises:
        ValueError: `alpha` or `k` is negative or not finite, `rounding` unknown, `text_retention` not in 0 to 1,
            `match_total` unknown or given beside `k`, `match_samples` not positive.

    Example:
        >>> tokens = Tokens(torch.eye(4), torch.eye(4)[[0, 2, 1, 3]], visual=torch.tensor([False, True, True, True]))
        >>> pool = AsymmetricPool(k=2)
        >>> pool.select(tokens).candidates, pool.cutoffs(lambda values: values)
        (tensor([1, 2]), [2])
    """

    def __init__(
        self,
        saliency: Saliency | None = None,
        alpha: float = 1.0,
        rounding: Literal["floor", "released"] = "floor",
        k: int | None = None,
        text_retention: float = 1.0,
        match_total: Literal["", "drift"] = "",
        match_samples: int = 8,
    ) -> None:
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"`alpha` {alpha}: must be a finite number, 0 or larger")
        if rounding not in ("floor", "released"):
            raise ValueError(f"`rounding` {rounding}: must be `floor` or `released`")
        if k is not None and k < 0:
            raise ValueError(f"`k` {k}: must be 0 or larger")
        if not 0 <= text_retention <= 1:
            raise ValueError(f"`text_retention` {text_retention}: must lie between 0 and 1")
        if match_total not in ("", "drift"):
            raise ValueError(f"`match_total` {match_total}: must be empty or `drift`")
        if match_total and k is not None:
            raise ValueError(f"`match_total` {match_total}: scales the budget, which `k` fixes already")
        if match_samples < 1:
            raise ValueError(f"`match_samples` {match_samples}: must be 1 or larger")
        self.saliency = saliency = DriftSaliency() if saliency is None else saliency
        self.needs = saliency.needs
        self.alpha = alpha
        self.rounding = rounding
        self.k = k
        self.needs_text = k is None  # the budget is a share of the text tokens
        self.text_retention = text_retention
        self.match_total = match_total
        self.wants_survey = bool(match_total)
        self.match_samples = self.survey_samples = match_samples
        self.survey_needs = saliency.needs
        self._matched = MatchedTotal(self._budget_of)
        self._factor = 1.0
        self._mean = 0.0
        self._start_block()

    def _start_block(self) -> None:
        self._totals: list[tuple[Tensor, int, int]] = []  # sum of a sample's saliencies, block, sample
        self._sizes: list[tuple[int, int]] = []

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Text tokens in any case; visual tokens as candidates, most salient first."""
        saliency = checked(self.saliency(tokens), tokens.visual_index, f"{name_of(self.saliency)}.__call__", FLOATS)
        # Looked at when all samples have run: to look at each would make a GPU wait.
        self._totals.append((saliency.double().sum(), tokens.block, tokens.sample))
        self._sizes.append((tokens.num_text, len(saliency)))
        # K can never exceed this, so no more candidates need to be held until the mean is known.
        most = self._budget_of(self._factor * self.saliency.maximum, *self._sizes[-1])
        ranking = self.saliency.ranking(tokens, saliency, most)
        text, counted = self._retained_text(tokens)
        return Selection(text, tokens.visual_index[ranking], saliency, counted)

    def _retained_text(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Which text tokens count, bool of shape (T,), and their indices."""
        if self.text_retention == 1:
            return tokens.text, tokens.text_index
        among = tokens.text_index
        moved = drift(tokens.hidden_in[among], tokens.hidden_out[among])
        kept = moved.argsort(descending=True, stable=True)[: round(self.text_retention * len(among))]
        indices = among[kept].sort().values
        return torch.zeros_like(tokens.text).index_fill_(0, indices, True), indices

    def cutoffs(self, sum_over_processes: SumOverProcesses) -> list[int]:
        """K of each sample, once the mean saliency over all samples of all processes is known.

        Raises:
            FloatingPointError: A saliency is NaN or infinite; names the sample.
        """
        totals = torch.stack([total for total, _, _ in self._totals]).tolist() if self._totals else []
        for total, (_, block, sample) in zip(totals, self._totals):
            if not math.isfinite(total):
                where = f"visual tokens at block {block} for calibration sample {sample}"
                raise FloatingPointError(f"NaN or infinity in the {self.saliency.name} of the {where}")
        own = torch.tensor([sum(totals), sum(visual for _, visual in self._sizes)], dtype=torch.float64)
        total, count = sum_over_processes(own).tolist()
        self._mean = total / max(count, 1)
        budgets = [self._budget_of(self._factor * self._mean, *size) for size in self._sizes]
        self._start_block()
        return budgets

    def _budget_of(self, mean: float, num_text: int, num_visual: int) -> int:
        if self.k is not None:
            return min(num_visual, self.k)
        if math.isinf(mean):
            return num_visual
        if self.rounding == "released":
            return min(num_visual, round(min(1.0, self.alpha * mean) * num_text))
        return math.floor(min(num_visual, self.alpha * mean * num_text))

    def held_tokens(self, text: int, visual: int) -> int:
        """See `Pool.held_tokens`."""
        return self._budget_of(self._factor * self.saliency.maximum, text, visual)

    def working_bytes(self, tokens: int, visual: int, width: int, widest: int, itemsize: int) -> int:
        """See `Pool.working_bytes`: visual tokens before and behind the block, in float32 and normalised."""
        return visual * width * (2 * itemsize + 16)

    def survey_sample(self, block: str, tokens: Tokens, inputs: Mapping[str, Tensor]) -> None:
        """Saliency and drift of the sample's visual tokens in the dense model."""
        moved = drift(tokens.hidden_in[tokens.visual_index], tokens.hidden_out[tokens.visual_index])
        self._matched.add(self.saliency(tokens), moved, tokens.num_text)

    def survey_block_end(
        self, block: str, linears: Mapping[str, nn.Linear], sum_over_processes: SumOverProcesses
    ) -> None:
        """Mean saliency and drift of the block."""
        self._matched.end_block(sum_over_processes)

    def survey_end(self, sum_over_processes: SumOverProcesses) -> dict[str, Any]:
        """The factor on the mean saliency, and how many visual tokens the dense model would spend with it."""
        factor, total, reference = self._matched.end(sum_over_processes)
        return {"factor": factor, "visual_tokens": total, "visual_tokens_of_drift": reference}

    def use_survey(self, findings: Mapping[str, Any]) -> None:
        """Scale budgets by the factor found."""
        self._factor = findings["factor"]

    def summary(self) -> dict[str, float]:
        """Mean saliency of the block just ended, under the name of the saliency (`mean_drift`)."""
        return {f"mean_{self.saliency.name}": self._mean}
