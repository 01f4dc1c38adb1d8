"""RIA: relative importance and activations."""

import pytest
import torch

from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.methods.scorers import RIAScorer
from lvlm_prune.methods.statistics import ChannelNorm


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_equals_its_equation_entry_by_entry(exponent, reference, gathered):
    golden = reference("wanda")
    weight, tokens = golden["W"].double().abs(), golden["X"].double().flatten(0, 1)
    score = RIAScorer(exponent).score(golden["W"], gathered(ChannelNorm, golden["X"]))
    for i, j in [(0, 0), (3, 95), (63, 17)]:
        share = weight[i, j] / weight[i].sum() + weight[i, j] / weight[:, j].sum()
        expected = share * tokens[:, j].norm() ** exponent
        assert score[i, j].item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_and_columns_of_zeros_do_not_make_nan(gathered):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight[1], weight[:, 2] = 0, 0
    pruned, _ = RIAScorer().prune(weight, gathered(ChannelNorm, [torch.ones(3, 6)]), 0.5, Unstructured())
    assert torch.isfinite(pruned).all()


@pytest.mark.parametrize("exponent", [-0.5, float("nan"), float("inf")])
def test_bad_exponent(exponent):
    with pytest.raises(ValueError, match=r"`exponent`"):
        RIAScorer(exponent)


def test_over_the_whole_matrix_the_lowest_scores_go_wherever_they_stand(gathered):
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)[:, None] ** 2
    statistic = gathered(ChannelNorm, [torch.ones(3, 6)])
    scorer = RIAScorer(group="layer")
    _, mask = scorer.prune(weight, statistic, 0.5, Unstructured())
    score = scorer.score(weight, statistic)
    assert int(mask.sum()) == 24
    assert score[mask].max() <= score[~mask].min()
    assert len(set(mask.sum(1).tolist())) > 1
    (promised,) = scorer.expected_zeros((8, 6), 0.5, Unstructured())
    assert promised.of(weight.masked_fill(mask, 0)).tolist() == [24]


def test_bad_group():
    with pytest.raises(ValueError, match=r"`group`"):
        RIAScorer(group="column")
