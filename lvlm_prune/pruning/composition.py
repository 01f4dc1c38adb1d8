"""What a pool took at a block: tokens of each modality, and, for one sample, how much each visual token counted.

text ████████████   image ▌   ──►  {"text": 412.0, "image": 9.0}     tokens over all samples, each by its weight
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lvlm_prune.distributed.processes import Processes
from lvlm_prune.methods.modality import MODALITIES
from lvlm_prune.methods.tokens import Selection, Tokens


class PoolCounts:
    """Counts what a pool selects at one block. Pools that choose for each Linear count as the mean over Linears.

    Args:
        example: Number of the sample whose visual tokens are noted one by one; None for none.
    """

    def __init__(self, example: int | None) -> None:
        self.example = example
        self._counted: Tensor | None = None
        self._candidates: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}
        self._example_calls = 0
        self._example: tuple[Tensor, Tensor] | None = None  # weights of all tokens so far, which of them are visual
        self._example_candidates: Tensor | None = None

    def add(self, tokens: Tokens, selection: Selection, row: int) -> None:
        """Count one selection of one sample; `row` numbers what this process saw, a sample or a part of one."""
        sample = tokens.sample
        weights = selection.weights.float()
        counted = torch.stack([weights @ one for one in _one_hot(tokens.modality)])
        self._counted = counted if self._counted is None else self._counted + counted
        self._calls[row] = self._calls.get(row, 0) + 1
        if selection.candidates is not None:
            self._candidates[sample] = tokens.modality[selection.candidates]
        if sample == self.example:
            self._example_calls += 1
            self._example = (weights if self._example is None else self._example[0] + weights, tokens.visual)
            self._example_candidates = selection.candidates

    def finish(self, chosen: Mapping[int, int], processes: Processes) -> tuple[dict[str, float], Tensor | None]:
        """What was counted, over all processes.

        Args:
            chosen: Sample of this process -> how many of its candidates count.
            processes: All processes of the run.

        Returns:
            Modality -> number of tokens, each by its weight, over all samples; and of the example's visual tokens
            the weights as `as_steps` has them, uint8 of shape (visual tokens,), or None.
        """
        sums = torch.zeros(len(MODALITIES), dtype=torch.float64)
        if self._counted is not None:
            sums += self._counted.double().cpu() / max(self._calls.values())
        if self._candidates:
            counted = torch.cat([modality[: chosen.get(sample, 0)] for sample, modality in self._candidates.items()])
            sums += torch.stack([one.sum() for one in _one_hot(counted)]).double().cpu()
        sums = processes.sum(sums)
        examples = [part for part in processes.gather(self._example_weights(chosen)) if part is not None]
        counted_tokens = {name: sums[code].item() for name, code in MODALITIES.items() if sums[code]}
        return counted_tokens, examples[0] if examples else None

    def _example_weights(self, chosen: Mapping[int, int]) -> Tensor | None:
        if self._example is None or self.example is None:
            return None
        weights, visual = self._example
        weights = weights / self._example_calls
        if self._example_candidates is not None:
            weights = weights.index_fill(0, self._example_candidates[: chosen.get(self.example, 0)], 1.0)
        return as_steps(weights[visual])


def _one_hot(modality: Tensor) -> list[Tensor]:
    return [(modality == code).float() for code in MODALITIES.values()]


def as_steps(weights: Tensor) -> Tensor:
    """Weights of tokens between 0 and 1 in steps of 1/255: uint8, a byte each.

    Example:
        >>> as_steps(torch.tensor([0.0, 1.0, 0.2]))
        tensor([  0, 255,  51], dtype=torch.uint8)
    """
    return (weights.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
