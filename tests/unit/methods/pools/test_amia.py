"""AMIA against its definition written out step by step, and in every corner where the released code does not end."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from lvlm_prune.methods.asking import asked_together
from lvlm_prune.methods.diversity import modality_diversity
from lvlm_prune.methods.pools import AMIAPool, amia
from lvlm_prune.methods.pools.amia import Distances, contributions, matching_prefix, neighbourhoods, selection_order
from tests.unit.methods.pools.conftest import make_tokens

LINEAR = "mlp.up_proj"


def step_by_step(tokens):
    """TAMP, Eqs. 3 to 5: every sum computed anew for every token taken."""
    unit = normalize(tokens.outputs[LINEAR], dim=-1)
    distance = 1 - unit @ unit.T
    neighbours = distance.topk(4, largest=False).indices[:, 1:]
    contribution = tokens.attention_last.clone()
    for index, near in enumerate(neighbours):
        contribution[index] += (torch.exp(-distance[index, near]) * tokens.attention_last[near]).sum()
    kernel = torch.exp(-distance)
    tolerance = 0.1 * modality_diversity(tokens.outputs[LINEAR], tokens.modality)[0] ** 0.5
    chosen = []
    while len(chosen) < len(unit):
        contribution[chosen] = -torch.inf
        taken = int(contribution.argmax())
        near = neighbours[taken]
        contribution[near] -= torch.exp(-0.2 * distance[taken, near]) * contribution[taken].clamp(min=0)
        chosen.append(taken)
        among = kernel[chosen]
        if among[:, chosen].mean() + kernel.mean() - 2 * among.mean() < tolerance:
            break
    return torch.zeros(len(unit), dtype=torch.bool).index_fill_(0, torch.tensor(chosen), True)


@pytest.mark.parametrize("seed", range(8))
def test_sums_updated_on_the_way_choose_the_same_tokens(seed):
    tokens = make_tokens(text=30, image=60, seed=seed, channels=8)
    expected = step_by_step(tokens)
    found = AMIAPool().select(tokens, LINEAR).weights
    assert torch.equal(found, expected)
    assert 1 < int(found.sum()) < 90


def test_a_match_that_comes_late_is_found_across_stretches():
    generator = torch.Generator().manual_seed(0)
    unit = normalize(torch.randn(300, 40, generator=generator), dim=-1)
    distances, order = Distances(unit), torch.randperm(300, generator=generator)
    kernel = torch.exp(-distances.rows(slice(None))).double()
    closeness = neighbourhoods(distances).closeness
    discrepancies = []
    for count in range(1, 301):
        rows = kernel[order[:count]]
        discrepancies.append((rows[:, order[:count]].mean() + kernel.mean() - 2 * rows.mean()).item())
    for wanted in (1, 2, 63, 64, 65, 100, 192, 193, 250, 299):
        tolerance = min(discrepancies[:wanted]) * (1 + 1e-3) + 1e-9
        expected = next(index for index, value in enumerate(discrepancies) if value < tolerance) + 1
        for stretch in (7, 64, 300):
            (found,) = asked_together([matching_prefix(distances, closeness, order.split(stretch), tolerance)])
            assert torch.equal(found, order[:expected])
    (everything,) = asked_together([matching_prefix(distances, closeness, order.split(64), -1.0)])
    assert torch.equal(everything, order)


def test_ends_whatever_the_sample(any_tokens):
    for pairs in ("all", "positive"):
        weights = AMIAPool(pairs).select(any_tokens, LINEAR).weights
        assert weights.dtype == torch.bool
        assert weights.shape == any_tokens.visual.shape
        assert weights.any()


def test_every_token_is_taken_once(any_tokens):
    unit = normalize(any_tokens.outputs[LINEAR], dim=-1)
    known = contributions(neighbourhoods(Distances(unit)), any_tokens.attention_last)
    order = torch.cat(list(selection_order(*known)))
    assert sorted(order.tolist()) == list(range(len(unit)))


def test_streams_that_run_side_by_side_are_one_vector_per_token():
    tokens = make_tokens()
    count = len(tokens.visual)
    single = tokens.outputs[LINEAR]
    double = make_tokens()
    double.outputs[LINEAR] = torch.cat([single, single])
    weights = AMIAPool().select(double, LINEAR).weights
    assert len(weights) == count
    assert torch.equal(weights, AMIAPool().select(tokens, LINEAR).weights)


class Largest(TorchDispatchMode):
    """Looks at every tensor that is made, and remembers the size of the largest one, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("seed", range(3))
def test_of_a_long_sample_only_a_few_rows_of_the_distances_are_held(seed, monkeypatch):
    tokens = make_tokens(text=100, image=300, seed=seed, channels=8)
    whole = AMIAPool().select(tokens, LINEAR).weights
    monkeypatch.setattr(amia, "HELD_PRODUCTS", 400 * 399)
    monkeypatch.setattr(amia, "_AT_ONCE", 400 * 30)
    with Largest() as largest:
        found = AMIAPool().select(tokens, LINEAR).weights
    assert torch.equal(found, whole)
    assert largest.nbytes == 4 * 400 * 30
    assert AMIAPool().working_bytes(400, 300, 64, 8, 4) == 4 * 400 * 8 + 3 * 4 * 400 * 30


def with_repeated_tokens(seed):
    """Tokens of which many are identical, as those of a plain background are."""
    tokens = make_tokens(text=10, image=30, seed=seed, channels=6)
    outputs = tokens.outputs[LINEAR]
    outputs[12:30:2] = outputs[12].clone()
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_of_the_paper_are_the_three_nearest_other_tokens_ties_by_index(seed):
    """Against float64 and a stable sort, with the token itself taken out by its number."""
    unit = normalize(with_repeated_tokens(seed).outputs[LINEAR], dim=-1)
    rows = Distances(unit).rows(slice(None))
    found = neighbourhoods(Distances(unit), "paper")
    for index, distances in enumerate(rows.double()):
        others = [other for other in distances.argsort(stable=True).tolist() if other != index][:3]
        by_distance = sorted(distances[others].tolist())
        assert index not in found.neighbours[index]
        assert found.near[index].double().tolist() == by_distance
        # Of more identical tokens than are looked at, the token itself need not be among the four nearest.
        if index in distances.argsort(stable=True)[:4]:
            assert found.neighbours[index].tolist() == others


def test_the_two_readings_of_the_neighbours_differ_only_where_tokens_repeat():
    apart = make_tokens(text=30, image=60, seed=0, channels=8)
    weights = {rule: AMIAPool(neighbours=rule).select(apart, LINEAR).weights for rule in ("released", "paper")}
    assert torch.equal(weights["released"], weights["paper"])
    unit = normalize(with_repeated_tokens(0).outputs[LINEAR], dim=-1)
    released, paper = (neighbourhoods(Distances(unit), rule).neighbours for rule in ("released", "paper"))
    # The released code leaves out any one of identical tokens, and so takes some tokens for their own neighbours.
    assert any(index in released[index] for index in range(12, 30, 2))
    assert not any(index in paper[index] for index in range(len(unit)))


def test_equal_distances_are_taken_in_the_order_of_the_tokens():
    distances = torch.tensor([[0.5] * 40 + [0.0] + [0.5] * 23])
    assert amia.nearest(distances, 4).tolist() == [[40, 0, 1, 2]]


def test_unknown_neighbours():
    with pytest.raises(ValueError, match="neighbours"):
        AMIAPool(neighbours="own")


def test_unknown_pairs():
    with pytest.raises(ValueError, match=r"`pairs` some: must be `all` or `positive`"):
        AMIAPool("some")
