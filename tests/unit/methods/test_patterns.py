"""Masks: exactly as many as promised, the lowest ones, ties by lowest column."""

import pytest
import torch

from lvlm_prune.methods.patterns import SemiStructured, Unstructured, ZeroCount, parse_pattern

EVERY_N_OF_M = [(keep, size) for size in (2, 3, 4, 8, 16) for keep in range(1, size)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("keep", "size"), EVERY_N_OF_M)
def test_every_n_of_m_keeps_the_n_highest(keep, size):
    score = random(7, 6 * size)
    pattern = parse_pattern(f"{keep}:{size}")
    assert isinstance(pattern, SemiStructured)
    mask = pattern.mask(score, pattern.sparsity)
    for scores, gone in zip(score.reshape(-1, size), mask.reshape(-1, size)):
        assert int(gone.sum()) == size - keep
        assert scores[gone].max() < scores[~gone].min()
    assert mask.float().mean().item() == pytest.approx(pattern.sparsity)


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.1, 9), (0.5, 48), (0.6, 57), (0.999, 95)])
def test_unstructured_prunes_the_floor_of_each_row(sparsity, count):
    score = random(5, 96)
    mask = Unstructured().mask(score, sparsity)
    assert mask.sum(dim=1).tolist() == [count] * 5
    if count:
        assert (score.masked_fill(~mask, -1).amax(dim=1) < score.masked_fill(mask, 2).amin(dim=1)).all()


def test_unstructured_prunes_the_floor_of_the_whole_matrix():
    score = random(5, 7)
    score[0] = 0
    mask = Unstructured().mask(score, 0.5, "layer")
    assert int(mask.sum()) == 17
    assert mask[0].all()


def test_ties_go_by_lowest_column():
    ties = torch.ones(3, 8)
    assert Unstructured().mask(ties, 0.4)[1].tolist() == [True] * 3 + [False] * 5
    assert SemiStructured(1, 4).mask(ties, 0.75)[1].tolist() == ([True] * 3 + [False]) * 2
    # More columns than a sorting network would keep in order by chance.
    wide = torch.ones(2, 5000)
    assert torch.equal(Unstructured().mask(wide, 0.3), (torch.arange(5000) < 1500).expand(2, -1))
    assert Unstructured().mask(torch.ones(4, 4), 0.5, "layer").tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "2:",
        ":4",
        "2:4:8",
        "4:2",
        "4:4",
        "0:4",
        "-1:4",
        "two:four",
        "2.0:4",
        "2:4,",
        "2:4,4:8",
        "2:4,unstructured",
    ],
)
def test_other_patterns_are_refused(text):
    with pytest.raises(ValueError, match=r"must be|needs|same sparsity"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "3:4,2:4,1:4"])
def test_a_pattern_is_written_as_it_is_read(text):
    assert str(parse_pattern(text)) == text


def test_what_a_pattern_promises_is_what_its_mask_does():
    weight = 1 + random(6, 16)
    for pattern in (Unstructured(), SemiStructured(2, 4), SemiStructured(5, 8)):
        for group in ("row", "layer"):
            mask = pattern.mask(weight, 0.4, group)
            promise = pattern.expected_zeros((6, 16), 0.4, group)
            found = promise.of(weight.masked_fill(mask, 0))
            assert set(found.tolist()) == {promise.least} == {promise.most}
            assert len(found) * promise.size == weight.numel()


def test_zeros_are_counted_in_the_columns_that_a_promise_is_about():
    weight = torch.ones(3, 10)
    weight[:, 8] = 0
    assert ZeroCount(3 * 4, 3, columns=slice(6, 10)).of(weight).tolist() == [3]
    assert ZeroCount(3 * 6, 0, columns=slice(0, 6)).of(weight).tolist() == [0]


@pytest.mark.parametrize("size", [4, 1000, 600 * 1000, 300 * 1000])
def test_zeros_of_a_large_weight_are_those_of_its_groups(size):
    weight = (random(600, 1000) > 0.3).bfloat16()
    expected = (weight.reshape(-1, size) == 0).sum(dim=1)
    found = ZeroCount(size, 0).of(weight)
    assert found.dtype == torch.int64
    assert found.equal(expected)


@pytest.mark.parametrize("pattern", ["unstructured", "1:4", "2:4", "4:8", "3:4"])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_masks_are_those_of_a_stable_sort_whatever_ties_there_are(pattern, group):
    generator = torch.Generator().manual_seed(0)
    for values in (2, 5, 1000):
        score = torch.randint(values, (24, 64), generator=generator).float()
        chosen = parse_pattern(pattern)
        for sparsity in (0.01, 0.5, 0.9):
            grouped = chosen.groups(score, group)
            count = chosen.pruned_per_group((24, 64), sparsity, group)
            lowest = grouped.sort(dim=1, stable=True).indices[:, :count]
            expected = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, lowest, True).view_as(score)
            assert torch.equal(chosen.mask(score, sparsity, group), expected)


def test_of_several_patterns_the_sparsity_of_a_linear_says_which():
    pattern = parse_pattern("1:4, 4:8")
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    assert (str(pattern), pattern.levels) == ("4:8,1:4", (0.5, 0.75))
    for sparsity, alone in ((0.5, SemiStructured(4, 8)), (0.75, SemiStructured(1, 4))):
        assert torch.equal(pattern.mask(score, sparsity), alone.mask(score, sparsity))
        assert pattern.expected_zeros((6, 16), sparsity) == alone.expected_zeros((6, 16), sparsity)
    assert not pattern.mask(score, 0.0).any()
    assert pattern.at(0.6).keep == 4  # what recovery knows is the share of zeros, which are at least those
