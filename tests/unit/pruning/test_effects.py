"""What pruning did to a Linear is measured against the sums over its inputs."""

import pytest
import torch

from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.methods.scorers import SparseGPTScorer, WandaScorer
from lvlm_prune.methods.statistics import ChannelNorm, Gram
from lvlm_prune.pruning.effects import PruningErrors, scored_rows


def pruned_with(scorer, statistic, sparsity=0.5, rows=24):
    torch.manual_seed(0)
    # Correlated channels: there, norms alone say something else than the Gram matrix.
    inputs = torch.randn(200, 16) @ torch.randn(16, 16)
    weight = torch.randn(rows, 16)
    sums = statistic(16)
    sums.add(inputs, torch.ones(200, dtype=torch.bool))
    after, mask = scorer.prune(weight, sums, sparsity, Unstructured())
    effects = PruningErrors()
    effects.add("linear", weight, after, mask, sums, scorer.score(weight, sums)[scored_rows(weight)])
    return effects, inputs.double(), weight.double(), after.double(), mask, scorer.score(weight, sums)


def test_with_a_gram_matrix_the_error_is_exact():
    effects, inputs, weight, after, _, _ = pruned_with(SparseGPTScorer(), Gram)
    expected = ((weight - after) @ inputs.T).norm() / (weight @ inputs.T).norm()
    assert effects.errors()["linear"] == pytest.approx(expected.item(), rel=1e-5)


def test_of_many_rows_some_speak_for_all(monkeypatch):
    monkeypatch.setattr(
        "lvlm_prune.pruning.effects._WEIGHTS_OF_ERROR", 100 * pruned_with(SparseGPTScorer(), Gram)[2].shape[1]
    )
    effects, inputs, weight, after, _, _ = pruned_with(SparseGPTScorer(), Gram, rows=1000)
    lost, whole = (((matrix[::10]) @ inputs.T).norm() for matrix in (weight - after, weight))
    assert effects.errors()["linear"] == pytest.approx((lost / whole).item(), rel=1e-5)


def test_with_norms_alone_channels_count_as_uncorrelated():
    effects, inputs, weight, after, _, _ = pruned_with(WandaScorer(), ChannelNorm)
    norms = inputs.square().sum(0)
    expected = ((weight - after).square() @ norms).sum().sqrt() / (weight.square() @ norms).sum().sqrt()
    assert effects.errors()["linear"] == pytest.approx(expected.item(), rel=1e-5)


def test_every_score_is_in_the_histogram_and_thresholds_are_of_rows():
    effects, _, weight, _, mask, score = pruned_with(WandaScorer(), ChannelNorm, sparsity=0.75)
    found = effects.scores()
    assert sum(found["pruned"]) == mask.sum()
    assert sum(found["pruned"]) + sum(found["kept"]) == weight.numel()
    edges = 10 ** (torch.arange(len(found["kept"]) + 1).double() / 10 + found["first"] / 10)
    for name, which in (("pruned", mask), ("kept", ~mask)):
        counted, _ = torch.histogram(score[which].double(), edges)
        assert counted.tolist() == found[name]
    thresholds = score.masked_fill(~mask, 0).amax(1)
    assert found["threshold"] == pytest.approx(torch.quantile(thresholds, torch.tensor([0.1, 0.5, 0.9])).tolist())


def test_a_block_of_dense_linears_has_no_scores():
    assert PruningErrors().scores() is None
    assert PruningErrors().errors() == {}
