"""Surveys: what a plugin may learn from the dense model before the first block is pruned.

allocation ─┐ wants_survey                        for each block of the dense model:
pool ───────┴──────────────► one survey for all       survey_block_start      no sample has gone through it yet
                                                      survey_block_changes    statistics of its Linears are at hand
                                                      survey_sample           each sample, once
                                                      survey_block_end        sums over processes
                                                      survey_so_far           what an interrupted run goes on from
                             survey_end ──► findings ──► manifest ──► use_survey      (also after --resume true)
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.tokens import Tokens

SumOverProcesses = Callable[[Tensor], Tensor]

Change = Callable[[int], AbstractContextManager[None]]
"""Number of a sample -> a context in which the block's weights are changed, as this sample is to see them."""


class RemainingBlocks(Protocol):
    """A block and all after it, for samples that wait at its input: what changed weights do to the loss."""

    def __len__(self) -> int:
        """Number of blocks."""

    @property
    def block(self) -> nn.Module:
        """The module of the first block that is left to run; its weights are in memory."""

    @property
    def num_samples(self) -> int:
        """Number of samples of this process."""

    def losses(self, changes: Sequence[Change]) -> dict[int, list[float]]:
        """Number of each sample of this process -> its mean next-token loss in nats under each change."""

    def answers(self) -> dict[int, Tensor]:
        """Number of each sample of this process -> what the unchanged model makes of its text positions."""

    def divergences(self, changes: Sequence[Change], dense: Mapping[int, Tensor]) -> dict[int, list[float]]:
        """Number of each sample of this process -> KL(dense || changed) in nats under each change."""

    def seconds(self) -> tuple[float, float]:
        """Seconds of one forward of the first block and of one loss; 0.0 where this process has no sample."""


@dataclass(frozen=True)
class SurveyCost:
    """What changed weights cost a survey, beside the forward of each sample through each block that every survey makes.

    Args:
        block_forwards: Forwards of one sample through one block.
        losses: Losses, or answers that are compared: each a product with the output embedding at text positions.

    Example:
        >>> print(SurveyCost(280, 112))
        280 block forwards and 112 losses
        >>> print(SurveyCost(1280))
        1,280 block forwards
    """

    block_forwards: int = 0
    losses: int = 0

    def __str__(self) -> str:
        return f"{self.block_forwards:,} block forwards" + (f" and {self.losses:,} losses" if self.losses else "")

    def seconds(self, block: float, loss: float) -> float:
        """How long it takes, with these seconds for one of each."""
        return self.block_forwards * block + self.losses * loss


def surveyed_samples(count: int | None, numbers: Sequence[int]) -> frozenset[int]:
    """Which samples a survey of `count` samples takes: of two surveys the smaller one takes a part of the larger one's.

    They are drawn, not the first ones: a calibration set may be in the order of the files that it comes from.

    Args:
        count: How many; None, or more than there are: all.
        numbers: Numbers of the samples of all processes, ascending.

    Example:
        >>> sorted(surveyed_samples(2, [0, 1, 2, 4, 5])), sorted(surveyed_samples(3, [0, 1, 2, 4, 5]))
        ([4, 5], [0, 4, 5])
    """
    places = sorted(range(len(numbers)), key=lambda place: hashlib.sha256(str(place).encode()).digest())
    return frozenset(numbers[place] for place in places[:count])


class Surveyor:
    """A plugin that may want a survey of the dense model: allocations and pools are surveyors.

    Example:
        >>> import torch
        >>> class CountTokens(Surveyor):
        ...     wants_survey = True
        ...     count = 0.0
        ...     def survey_sample(self, block, tokens, inputs):
        ...         self.count += len(tokens.modality)
        ...     def survey_end(self, sum_over_processes):
        ...         return {"tokens": sum_over_processes(torch.tensor([self.count], dtype=torch.float64)).item()}
        ...     def use_survey(self, findings):
        ...         self.tokens = findings["tokens"]
        >>> counter = CountTokens()
        >>> tokens = Tokens(torch.zeros(3, 2), torch.zeros(3, 2), visual=torch.zeros(3, dtype=torch.bool))
        >>> counter.survey_sample("layers.0", tokens, inputs={})
        >>> counter.survey_end(lambda values: values)
        {'tokens': 3.0}
    """

    wants_survey: bool = False
    """True where a survey of the dense model is to run before pruning."""
    survey_needs: frozenset[str] = frozenset()
    """Optional fields of `Tokens` that `survey_sample` looks at, of `methods.tokens.NEEDS`; others stay empty."""
    survey_samples: int | None = None
    """How many calibration samples the survey takes, drawn from the set, the same on any number of processes; None, or
    more than there are: all of them."""
    wants_survey_losses: bool = False
    """True where losses or divergences are evaluated, which needs the output embedding in memory."""
    wants_survey_statistics: bool = False
    """True where `survey_block_changes` is to be called, with the sums that the method's solver needs, over the pool of
    the method and the samples of the survey. Every block is run once more for them."""
    survey_depends_on_method: bool = False
    """True where findings depend on the method: sparsity, pattern, pool, scorer and solver."""

    def survey_cost(self, linears: Mapping[str, list[str]], samples: int) -> SurveyCost:
        """What trying changed weights takes, for the plan and for a line before the survey starts; default: nothing.

        Args:
            linears: Path of each block -> names of its Linears that are going to be pruned, relative to the block.
            samples: How many samples are surveyed.
        """
        return SurveyCost()

    def survey_bytes(self, shapes: Mapping[str, tuple[int, int]], itemsize: int, on_gpu: bool = False) -> int:
        """Not required: bytes that trying changed weights of a block takes beside it and its statistics, for the plan.

        Args:
            shapes: Name of each Linear, relative to the block -> (C_out, C_in).
            itemsize: Bytes of one weight in memory.
            on_gpu: Whether the block is on a GPU.
        """
        return 0

    def survey_block_start(self, block: str, linears: Mapping[str, nn.Linear], remaining: RemainingBlocks) -> None:
        """The samples of this process are at the input of the block; no sums over processes here.

        Args:
            block: Path of the block.
            linears: Its Linears that are going to be pruned, name relative to the block -> module with its weight.
            remaining: This block and all after it, for this process' share of the samples to survey.
        """

    def survey_block_changes(
        self,
        block: str,
        linears: Mapping[str, nn.Linear],
        statistics: Mapping[str, Statistic | None],
        remaining: RemainingBlocks,
    ) -> None:
        """Not required: the samples are still at the input of the block, its statistics are known; no sums here.

        Args:
            block: Path of the block.
            linears: Its Linears that are going to be pruned, name relative to the block -> module with its weight.
            statistics: Of the same names, sums over the samples of all processes; None where no token came along.
            remaining: This block and all after it, for this process' share of the samples to survey.
        """

    def survey_sample(self, block: str, tokens: Tokens, inputs: Mapping[str, Tensor]) -> None:
        """One sample went through the block; no sums over processes here.

        Args:
            block: Path of the block.
            tokens: The sample's real tokens; valid only during this call.
            inputs: Input of each Linear that the block called, name relative to the block -> shape (n, C_in). Mostly
                n = T; where k streams run side by side n = k T, and any n where a Linear sees other tokens than the
                decoder's own. The same holds for `tokens.outputs`.
        """

    def survey_block_end(
        self, block: str, linears: Mapping[str, nn.Linear], sum_over_processes: SumOverProcesses
    ) -> None:
        """All samples of all processes went through the block.

        Args:
            block: Path of the block.
            linears: Its Linears that are going to be pruned, the same on all processes.
            sum_over_processes: Sums a float64 tensor over all processes (the identity with one).
        """

    def survey_so_far(self) -> dict[str, Any] | None:
        """Not required: what the finished blocks gave, for an interrupted run to go on behind the last of them.

        Asked after each `survey_block_end`. No hook is raised for these blocks again.

        Returns:
            Plain data for the manifest, the same on all processes; None: a survey that was interrupted begins anew.
        """
        return None

    def continue_survey(self, found: dict[str, Any]) -> None:
        """Take what `survey_so_far` returned in the interrupted run; the blocks after it follow. Default: `use_survey`.

        Args:
            found: As it was returned, read from the manifest.
        """
        self.use_survey(found)

    def survey_end(self, sum_over_processes: SumOverProcesses) -> dict[str, Any]:
        """What was found, as plain data for the manifest, the same on all processes."""
        return {}

    def use_survey(self, findings: Mapping[str, Any]) -> None:
        """Take what `survey_end` returned, just now or in the interrupted run that goes on."""
