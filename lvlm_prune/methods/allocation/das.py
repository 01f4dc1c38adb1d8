"""Diversity-aware sparsity of TAMP: a Linear whose output tokens are all alike can lose more."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lvlm_prune.methods.allocation.base import block_of
from lvlm_prune.methods.allocation.water_filling import WaterFillingAllocation
from lvlm_prune.methods.diversity import Pairs, diversity_terms, mean_diversity
from lvlm_prune.methods.survey import SumOverProcesses
from lvlm_prune.methods.tokens import Tokens

Variant = Literal["linears", "all_token", "per_block"]


class DASAllocation(WaterFillingAllocation):
    r"""Sparsity inversely related to the diversity of a Linear's output tokens (TAMP, ACL Findings 2025, section 3.2).

    .. math:: c_l = \operatorname{mean}_{samples} \tfrac13 (s_v + s_l + s_{vl})

    from one survey of the dense model, see `lvlm_prune.methods.diversity`; the kept weights are dealt out in proportion
    to it by water-filling. A Linear that saw no calibration token counts with the mean of the others.

    Args:
        variant: `linears` is the paper's method; `all_token` takes one mean over all pairs of tokens, whatever their
            modality; `per_block` gives all Linears of a block one sparsity, from the mean of their scores.
        pairs: `all` pairs of tokens within a modality as in the paper, or only those of `positive` cosine as in the
            released code.
        aggregate: `sum` deals out by score, which favours small Linears, as in the released code; `avg` divides the
            score by the number of weights first, as its other setting does.
        max_sparsity: Largest sparsity that a Linear may get. Default: 0.1 above the target.

    Raises:
        ValueError: An option is unknown or out of range.

    Example:
        >>> allocation = DASAllocation()
        >>> allocation.use_survey({"diversity": {"0.q_proj": 0.9, "0.v_proj": 0.3}})
        >>> shapes = {"0.q_proj": (10, 10), "0.v_proj": (10, 10)}
        >>> {name: round(value, 3) for name, value in allocation.allocate(shapes, 0.5).items()}
        {'0.q_proj': 0.45, '0.v_proj': 0.55}
    """

    wants_survey = True
    survey_needs = frozenset({"outputs"})

    def __init__(
        self,
        variant: Variant = "linears",
        pairs: Pairs = "all",
        aggregate: Literal["sum", "avg"] = "sum",
        max_sparsity: float | None = None,
    ) -> None:
        for option, value, allowed in (
            ("variant", variant, ("linears", "all_token", "per_block")),
            ("pairs", pairs, ("all", "positive")),
            ("aggregate", aggregate, ("sum", "avg")),
        ):
            if value not in allowed:
                raise ValueError(f"`{option}` {value}: must be one of {', '.join(allowed)}")
        self.variant: Variant = variant
        self.pairs: Pairs = pairs
        self.aggregate = aggregate
        super().__init__(max_sparsity)
        self._found: list[tuple[str, Tensor]] = []
        self._diversity: dict[str, float] = {}

    def survey_sample(self, block: str, tokens: Tokens, inputs: Mapping[str, Tensor]) -> None:
        """Diversity of the outputs of each Linear; looked at when all samples have run, or a GPU would have to wait."""
        for name in inputs:
            terms = self._terms(tokens.outputs[name], tokens)
            if terms:
                self._found.append((f"{block}.{name}", torch.stack(terms)))

    def _terms(self, outputs: Tensor, tokens: Tokens) -> list[Tensor]:
        """What the diversity of one sample's outputs is the mean of; nothing without two tokens to compare."""
        streams, rest = divmod(len(outputs), max(len(tokens.modality), 1))
        if self.variant == "all_token" or rest:  # tokens that are not the decoder's own have no modality
            return [mean_diversity(outputs, self.pairs)] if len(outputs) > 1 else []
        if streams == 1:
            return list(diversity_terms(outputs, tokens.modality, self.pairs, tokens.modality_counts).values())
        return list(diversity_terms(outputs, tokens.modality.repeat(streams), self.pairs).values())

    def _scores(self) -> Iterator[tuple[str, float]]:
        """Full name of each Linear and diversity of its outputs, sample by sample."""
        if self._found:
            values = torch.cat([terms for _, terms in self._found]).tolist()
            for name, terms in self._found:
                own, values = values[: len(terms)], values[len(terms) :]
                yield name, sum(own) / len(own)
        self._found = []

    def survey_block_end(
        self, block: str, linears: Mapping[str, nn.Linear], sum_over_processes: SumOverProcesses
    ) -> None:
        """Mean over the samples of all processes."""
        names = [f"{block}.{name}" for name in linears]
        totals = {name: [0.0, 0.0] for name in names}
        for name, score in self._scores():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += score
            total[1] += 1
        sums = torch.tensor([totals[name] for name in names], dtype=torch.float64).reshape(-1, 2)
        for name, (total, count) in zip(names, sum_over_processes(sums).tolist()):
            if count:
                self._diversity[name] = total / count

    def survey_end(self, sum_over_processes: SumOverProcesses) -> dict[str, Any]:
        """Score of each Linear that saw calibration tokens."""
        return {"diversity": self._diversity}

    def use_survey(self, findings: Mapping[str, Any]) -> None:
        """Take the diversity score of each Linear from what the survey found."""
        self._diversity = dict(findings["diversity"])

    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """Water-filling over Linears, or over blocks."""
        known = [self._diversity[name] for name in shapes if name in self._diversity]
        mean = sum(known) / max(len(known), 1)
        scores = {name: self._diversity.get(name, mean) for name in shapes}
        groups = {name: name for name in shapes}
        if self.variant == "per_block":
            groups = {name: block_of(name) for name in shapes}
            members = {group: sum(other == group for other in groups.values()) for group in groups.values()}
            scores = {name: score / members[groups[name]] for name, score in scores.items()}
        return self.fill(scores, shapes, groups, sparsity, average=self.aggregate == "avg")
