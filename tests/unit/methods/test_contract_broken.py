"""`check_plugin` says in one line what is wrong with a plugin that is not right."""

import pytest
import torch

from lvlm_prune.methods import Allocation, Pool, Saliency, Scorer, Selection, Statistic
from lvlm_prune.methods.allocation import ECoFLaPAllocation
from lvlm_prune.methods.pools import AsymmetricPool, TextOnlyPool
from lvlm_prune.methods.scorers import MagnitudeScorer
from lvlm_prune.methods.statistics import ChannelNorm
from lvlm_prune.methods.testing import PluginFault, check_plugin


class Magnitude(Scorer):
    def score(self, weight, statistic):
        return weight.float().abs()


class ColumnScorer(Scorer):
    def score(self, weight, statistic):
        return weight.float().abs().mean(0)


class HalfScorer(Scorer):
    def score(self, weight, statistic):
        return weight.abs()


class ShareOfAllScorer(Scorer):
    by_row = True

    def score(self, weight, statistic):
        return weight.float().abs() / weight.float().abs().sum(0)


class DiceScorer(Scorer):
    def score(self, weight, statistic):
        return torch.rand(weight.shape)


class WearingScorer(Scorer):
    def score(self, weight, statistic):
        return weight.mul_(2).float().abs()


class ForgetfulScorer(Magnitude):
    def __init__(self, power: float = 2.0) -> None:
        self._power = power


class ElsewhereScorer(Magnitude):
    power = 2.0

    def __init__(self, power: float = 2.0) -> None:
        self._power = power


class SwappingPool(TextOnlyPool):
    """Keeps its two parts the wrong way round."""

    def __init__(self, first: Scorer, second: Scorer) -> None:
        self.first, self.second = second, first


class FirstRowScorer(Scorer):
    by_row = True

    def score(self, weight, statistic):
        return weight.float().abs() / weight[0].float().abs()


class DoublingScorer(Magnitude):
    def __init__(self, power: float = 2.5) -> None:
        self.power = 2 * power


class NegativeZeroScorer(Magnitude):
    def prune(self, weight, statistic, sparsity, pattern):
        pruned, mask = super().prune(weight, statistic, sparsity, pattern)
        return torch.where(mask, -torch.zeros_like(pruned), pruned), mask


class ScalingScorer(Magnitude):
    def prune(self, weight, statistic, sparsity, pattern):
        pruned, mask = super().prune(weight, statistic, sparsity, pattern)
        return 2 * pruned, mask


class OneTooManyScorer(Magnitude):
    def prune(self, weight, statistic, sparsity, pattern):
        _, mask = super().prune(weight, statistic, sparsity, pattern)
        mask[0] = True
        return weight.masked_fill(mask, 0.0), mask


class HeavyScorer(Magnitude):
    def working_bytes(self, shape, itemsize):
        return -1


class TensorNotes(Magnitude):
    def notes(self, statistic, mask, sparsity):
        return {"pruned": mask.sum()}


class VagueScorer(Magnitude):
    def check(self, pattern):
        raise ValueError("not with this pattern")


class Mean(Statistic):
    """A sum of squares over all channels: a scalar."""

    def __init__(self, channels, device="cpu"):
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs, weights):
        self.total += (weights.float().square() @ inputs.float().square()).sum()

    def tensors(self):
        return [self.total]


class Counted(Mean):
    def __init__(self, channels, device="cpu"):
        self.total = torch.zeros(3, dtype=torch.float64, device=device)


class SinglePrecision(Mean):
    def __init__(self, channels, device="cpu"):
        self.total = torch.zeros(channels, device=device)


class Largest(ChannelNorm):
    def add(self, inputs, weights):
        largest = (weights.float()[:, None] * inputs.float()).abs().amax(0) if len(inputs) else 0
        self.value.copy_(torch.maximum(self.value, torch.as_tensor(largest, dtype=torch.float64)))


class Unweighted(ChannelNorm):
    def add(self, inputs, weights):
        self.value += inputs.float().square().sum(0)


class Copies(ChannelNorm):
    def tensors(self):
        return [self.value.clone()]


class Slim(ChannelNorm):
    @classmethod
    def nbytes(cls, channels):
        return channels


class MatrixSaliency(Saliency):
    def __call__(self, tokens):
        return tokens.hidden_out[tokens.visual].float()


class StorageSaliency(Saliency):
    """Looks at the memory around its tokens, which holds the padding of the batch."""

    def __call__(self, tokens):
        around = tokens.hidden_out.untyped_storage().nbytes() // tokens.hidden_out.element_size()
        return tokens.hidden_out[tokens.visual].float().norm(dim=-1) / around


class AttentionStorageSaliency(Saliency):
    """Looks at the memory around what attention gives each token."""

    needs = frozenset({"attention_mean"})

    def __call__(self, tokens):
        return tokens.attention_mean[tokens.visual].float() / tokens.attention_mean.untyped_storage().nbytes()


class CountingSaliency(Saliency):
    def __init__(self) -> None:
        self._asked = 0

    def __call__(self, tokens):
        self._asked += 1
        return tokens.hidden_out[tokens.visual].float().norm(dim=-1) * self._asked


class UndeclaredSaliency(Saliency):
    def __call__(self, tokens):
        return tokens.attention_mean[tokens.visual]


class AboveItsMaximum(Saliency):
    maximum = 0.5

    def __call__(self, tokens):
        return torch.ones(tokens.num_visual)


class LongPool(Pool):
    def select(self, tokens, linear=None):
        return Selection(torch.ones(2 * len(tokens.visual), dtype=torch.bool))


class PaddedPool(Pool):
    """Takes tokens by how many there are in memory, padding included."""

    def select(self, tokens, linear=None):
        rows = tokens.hidden_in.untyped_storage().nbytes() // tokens.hidden_in[0].nbytes
        return Selection(torch.arange(len(tokens.visual)) < rows // 4)


class RunningPool(Pool):
    def __init__(self) -> None:
        self._seen = 0

    def select(self, tokens, linear=None):
        self._seen += len(tokens.visual)
        return Selection(torch.arange(len(tokens.visual)) < self._seen // 4)


class OwnMeanPool(AsymmetricPool):
    """Decides by the mean of its own samples."""

    def cutoffs(self, sum_over_processes):
        return super().cutoffs(lambda values: values)


class UnplannedPool(AsymmetricPool):
    def held_tokens(self, text, visual):
        return 0


class GreedyAllocation(Allocation):
    def allocate(self, shapes, sparsity):
        return dict.fromkeys(shapes, sparsity + 0.1)


class LastLinearOnly(Allocation):
    def allocate(self, shapes, sparsity):
        return {list(shapes)[-1]: sparsity}


class LosesFinishedBlocks(ECoFLaPAllocation):
    def continue_survey(self, found):
        """Forgets it."""


WRONG = {
    ColumnScorer(): r"ColumnScorer.score: float32 of shape \(24,\), expected float32 of shape \(8, 24\)",
    HalfScorer(): r"HalfScorer.score: bfloat16 of shape \(8, 24\), expected float32",
    ShareOfAllScorer(): "ShareOfAllScorer.score: the score of a row depends on other rows, but `by_row` is True",
    DiceScorer(): "DiceScorer.score: another answer to the same question",
    WearingScorer(): "WearingScorer.score: changes `weight`",
    ForgetfulScorer(): "ForgetfulScorer: the constructor's argument `power` is not kept as an attribute of that name",
    ElsewhereScorer(): "ElsewhereScorer: the constructor's argument `power` is not kept as an attribute of that name",
    SwappingPool(Magnitude(), MagnitudeScorer()): r"SwappingPool: made with `first` \('MagnitudeScorer'",
    FirstRowScorer(): "FirstRowScorer.score: the score of a row depends on other rows, but `by_row` is True",
    DoublingScorer(): "DoublingScorer: made with `power` 5.0, it keeps 10.0",
    NegativeZeroScorer(): r"NegativeZeroScorer.prune: not \+0.0 everywhere where the mask is True",
    ScalingScorer(): "ScalingScorer.prune: changes weights that stay, but `updates_weights` is False",
    OneTooManyScorer(): "OneTooManyScorer.prune: .* zeros among 24 weights, 12 to 12 are promised under unstructured",
    HeavyScorer(): "HeavyScorer.working_bytes: -1, expected a number",
    TensorNotes(): "TensorNotes.notes: .* is no plain data for the manifest",
    VagueScorer(): "VagueScorer.check: 'not with this pattern'; a refusal begins with the argument in backticks",
    Mean: r"Mean.tensors: float64 of shape \(\); the first sum must have an entry for each of the 24 channels",
    Counted: r"Counted.tensors: float64 of shape \(3,\); the first sum must have an entry",
    SinglePrecision: r"SinglePrecision.tensors: float32 of shape \(24,\), expected float64 sums",
    Largest: "Largest: the sums of two processes do not add up to those of one",
    Unweighted: "Unweighted.add: tokens of weight 0 count",
    Copies: "Copies.tensors: copies",
    Slim: "Slim.nbytes: 24 for the plan, but its sums hold 192 bytes",
    MatrixSaliency(): r"MatrixSaliency.__call__: float32 of shape \(9, 16\), expected float32 of shape \(9,\)",
    StorageSaliency(): "StorageSaliency.__call__: changes with padding",
    AttentionStorageSaliency(): "AttentionStorageSaliency.__call__: changes with padding",
    CountingSaliency(): "CountingSaliency.__call__: depends on what it was asked before",
    UndeclaredSaliency(): "UndeclaredSaliency: fails on a small sample .* fields that `needs` names: none",
    AboveItsMaximum(): "AboveItsMaximum.__call__: 1, but `maximum` is 0.5",
    LongPool(): r"LongPool.select, weights: bool of shape \(30,\), expected bool or float32 of shape \(15,\)",
    PaddedPool(): "PaddedPool.select: changes with padding",
    RunningPool(): "RunningPool.select: depends on the samples before",
    OwnMeanPool(alpha=20.0): "OwnMeanPool.cutoffs: .* on one process, .* on two; sum over processes before deciding",
    UnplannedPool(): "UnplannedPool.held_tokens: 0 for the plan, but",
    GreedyAllocation(): "GreedyAllocation.allocate: a mean of 0.4 over all weights, expected the target 0.3",
    LosesFinishedBlocks(): "LosesFinishedBlocks.continue_survey: .* after an interruption, .* without one",
    LastLinearOnly(): "LastLinearOnly.allocate: .* expected a sparsity for each Linear",
}


@pytest.mark.parametrize("plugin", WRONG, ids=lambda plugin: getattr(plugin, "__name__", type(plugin).__name__))
def test_what_is_wrong_is_said_in_one_line(plugin):
    with pytest.raises(PluginFault, match=f"^{WRONG[plugin]}") as fault:
        check_plugin(plugin)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("other", [ColumnScorer, 3])
def test_what_is_no_plugin_is_no_fault_of_one(other):
    with pytest.raises(TypeError) as error:
        check_plugin(other)
    assert not isinstance(error.value, PluginFault)
