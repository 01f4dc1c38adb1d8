"""DBS against a greedy search that recomputes everything in every step."""

import pytest
import torch

from lvlm_prune.methods.saliency import DiversitySaliency
from lvlm_prune.methods.tokens import Tokens


def sample(count, seed, repeated=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count + 5, 6, generator=generator) + 0.5
    if repeated:
        hidden[1::2] = hidden[::2][: len(hidden[1::2])]
    visual = torch.zeros(count + 5, dtype=torch.bool)
    visual[2 : 2 + count] = True
    return Tokens(hidden, hidden.flip(0), visual)


def greedy(vectors, count, start="mean"):
    """Farthest-point selection as its definition reads, in float64."""
    distance = 1 - torch.cosine_similarity(vectors[:, None].double(), vectors[None].double(), dim=-1)
    means = distance.fill_diagonal_(0).sum(1) / max(len(vectors) - 1, 1)
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(1)
    chosen = [int((means if start == "mean" else nearest).argmax())] if count else []
    while len(chosen) < count:
        left = [index for index in range(len(vectors)) if index not in chosen]
        chosen.append(max(left, key=lambda index: min(distance[index, other] for other in chosen)))
    return chosen


@pytest.mark.parametrize("start", ["mean", "nearest"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_greedy_search_for_every_budget(seed, start):
    tokens = sample(17, seed)
    saliency = DiversitySaliency(start)
    values = saliency(tokens)
    for count in range(19):
        ranking = saliency.ranking(tokens, values, count).tolist()
        assert ranking == greedy(tokens.hidden_in[tokens.visual], min(count, 17), start)


def test_the_values_are_mean_distances_to_the_other_visual_tokens():
    tokens = sample(17, 0)
    vectors = tokens.hidden_in[tokens.visual].double()
    distance = 1 - torch.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    expected = distance.fill_diagonal_(0).sum(1) / 16
    torch.testing.assert_close(DiversitySaliency()(tokens).double(), expected, rtol=0, atol=1e-6)


def test_identical_tokens_are_taken_once_each_and_after_all_others():
    tokens = sample(12, 0, repeated=True)
    ranking = DiversitySaliency().ranking(tokens, DiversitySaliency()(tokens), 12)
    assert sorted(ranking.tolist()) == list(range(12))
    first = tokens.hidden_in[tokens.visual][ranking[:6]]
    assert len(torch.unique(first, dim=0)) == 6


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens_to_differ(count):
    tokens = sample(count, 0)
    values = DiversitySaliency()(tokens)
    assert values.tolist() == [0.0] * count
    assert DiversitySaliency().ranking(tokens, values, 5).tolist() == list(range(count))


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match=r"`start`"):
        DiversitySaliency("middle")
