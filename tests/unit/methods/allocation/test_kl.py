"""KL allocation deals the target out where the divergences add up to the least."""

from itertools import product

import pytest
import torch

from lvlm_prune.methods.allocation import KLAllocation
from lvlm_prune.methods.allocation.kl import LogCurve, cheapest_levels, least_sum
from lvlm_prune.methods.patterns import SemiStructured, Unstructured
from lvlm_prune.methods.scorers import WandaScorer

LEVELS = [0.45, 0.6, 0.7]


def curves_of(seed: int, count: int) -> list[LogCurve]:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 + 0.05
    return [LogCurve(LEVELS, (row.cumsum(0) - 6).exp().tolist()) for row in steps]


@pytest.mark.parametrize("seed", range(5))
def test_no_exchange_between_two_groups_is_better(seed):
    """At the least sum, moving weights from one group to another never pays."""
    curves = curves_of(seed, 6)
    sizes = [100, 300, 50, 200, 200, 150]
    found = least_sum(curves, sizes, 0.6, 0.45, 0.75)
    assert sum(size * value for size, value in zip(sizes, found)) / 1000 == pytest.approx(0.6, abs=1e-9)
    assert all(0.45 - 1e-9 <= value <= 0.75 + 1e-9 for value in found)
    total = sum(float(curve(torch.tensor([value]))) for curve, value in zip(curves, found))
    for first, second in product(range(6), range(6)):
        moved = list(found)
        moved[first] += 2.0 / sizes[first]
        moved[second] -= 2.0 / sizes[second]
        if first != second and moved[second] >= 0.45 and moved[first] <= 0.75:
            assert sum(float(curve(torch.tensor([value]))) for curve, value in zip(curves, moved)) > total * (1 - 1e-4)


def test_groups_that_are_alike_get_alike():
    found = least_sum([LogCurve(LEVELS, [0.1, 0.2, 0.4])] * 4, [100] * 4, 0.6, 0.45, 0.75)
    assert max(found) - min(found) < 0.005


def test_of_two_groups_with_the_same_divergence_the_larger_one_loses_more():
    small, large = least_sum([LogCurve(LEVELS, [0.1, 0.2, 0.4])] * 2, [100, 400], 0.6, 0.45, 0.75)
    assert small < 0.6 < large


def test_more_goes_where_it_costs_less():
    steep, flat = LogCurve(LEVELS, [0.1, 1.0, 10.0]), LogCurve(LEVELS, [0.1, 0.11, 0.12])
    found = least_sum([steep, flat], [100, 100], 0.6, 0.5, 0.75)
    assert found[0] < 0.6 < found[1]


@pytest.mark.parametrize(
    ("groups", "together"),
    [
        ("linear", []),
        ("kind", [("0.attn.q", "0.attn.o"), ("0.mlp.up", "0.mlp.down")]),
        ("block", [("0.attn.q", "0.attn.o", "0.mlp.up", "0.mlp.down")]),
    ],
)
def test_groups_get_one_sparsity(groups, together):
    shapes = {f"{block}.{name}": (8, 8) for block in (0, 1) for name in ("attn.q", "attn.o", "mlp.up", "mlp.down")}
    allocation = KLAllocation(groups=groups)
    names = dict.fromkeys(allocation._group_of(name) for name in shapes)
    kl = {name: [0.1, 0.2 + 0.05 * at, 0.4 + 0.3 * at] for at, name in enumerate(names)}
    allocation.use_survey({"levels": LEVELS, "kl": kl})
    found = allocation.allocate(shapes, 0.6)
    assert sum(found.values()) / len(found) == pytest.approx(0.6, abs=1e-6)
    assert len(names) == {"linear": 8, "kind": 4, "block": 2}[groups]
    assert len(set(found.values())) > 1
    for names in together:
        assert len({found[name] for name in names}) == 1


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.8, 0.97])
def test_levels_lie_around_the_target(sparsity):
    allocation = KLAllocation()
    allocation.use_method(WandaScorer().solver(), Unstructured(), sparsity)
    assert len(allocation._tried) >= 2
    assert all(0 < level < 1 for level in allocation._tried)
    assert allocation._tried[0] <= sparsity <= allocation._tried[-1] + 0.05


@pytest.mark.parametrize(
    ("option", "value"),
    [("samples", 0), ("levels", [0.5]), ("levels", [0.5, 1.0]), ("groups", "layer"), ("width", 0.0), ("width", 2.0)],
)
def test_options_that_make_no_sense_are_refused(option, value):
    with pytest.raises(ValueError, match=f"`{option}`"):
        KLAllocation(**{option: value})


def test_with_n_of_m_nothing_is_measured_and_nothing_dealt_out():
    allocation = KLAllocation()
    assert allocation.under(Unstructured()) is allocation
    dealt = allocation.under(SemiStructured(2, 4))
    assert dealt.uniform
    assert not dealt.wants_survey


def test_below_the_sparsity_of_n_of_m_those_go_that_cost_least():
    allocation = KLAllocation()
    allocation.use_method(WandaScorer().solver(), SemiStructured(2, 4), 0.4)
    names = [f"layers.{block}.mlp.{name}" for block in range(4) for name in ("up_proj", "down_proj")]
    kl = {name: [0.01 * (at + 1) ** 2] for at, name in enumerate(names)}
    allocation.use_survey({"levels": [0.5], "kl": kl})
    shapes = dict.fromkeys(names, (8, 8))
    dealt = allocation.allocate(shapes, 0.4)
    assert list(dealt.values()) == [0.5] * 7 + [0.0]  # 7 of 8 are the first to reach four fifths
    assert allocation.allocate(shapes, 0.5) == dict.fromkeys(names, 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_as_many_weights_costs_much_less(seed):
    """Against all subsets: the least sum at the asked share, which the greedy choice may miss by one group's step."""
    generator = torch.Generator().manual_seed(seed)
    divergences = torch.rand(8, generator=generator).square().tolist()
    sizes = torch.randint(1, 4, (8,), generator=generator).tolist()
    share = 0.2 + 0.7 * torch.rand((), generator=generator).item()
    found = [level > 0 for level in cheapest_levels([0.5], [[value] for value in divergences], sizes, share / 2)]
    sums = {}
    for chosen in product((False, True), repeat=8):
        if sum(size for size, gone in zip(sizes, chosen) if gone) >= share * sum(sizes):
            sums[chosen] = sum(value for value, gone in zip(divergences, chosen) if gone)
    assert tuple(found) in sums
    assert sums[tuple(found)] <= min(sums.values()) + max(value for value, gone in zip(divergences, found) if gone)


@pytest.mark.parametrize("seed", range(5))
def test_levels_cost_little_more_than_the_best_choice_of_all(seed):
    """By trying all; what a group that is too large to fit prunes too much is at most one step."""
    generator = torch.Generator().manual_seed(seed)
    divergences = torch.rand(6, 3, generator=generator, dtype=torch.float64).square().cumsum(1).tolist()
    sizes = torch.randint(1, 4, (6,), generator=generator).tolist()
    levels, wanted = [0.25, 0.5, 0.75], 0.1 + 0.6 * torch.rand((), generator=generator).item()
    found = cheapest_levels(levels, divergences, sizes, wanted)
    cost = [dict(zip([0.0, *levels], [0.0, *values])) for values in divergences]

    def mean(chosen):
        return sum(level * size for level, size in zip(chosen, sizes)) / sum(sizes)

    def total(chosen):
        return sum(values[level] for values, level in zip(cost, chosen))

    best = min(total(chosen) for chosen in product([0.0, *levels], repeat=6) if mean(chosen) >= wanted)
    assert mean(found) >= wanted - 1e-9
    assert best <= total(found) + 1e-9 <= best + max(values[0.75] for values in cost)
    assert total(found) < total([0.75] * 6)
