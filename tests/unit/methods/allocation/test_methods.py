"""DAS, OWL, ECoFLaP against the released code on its own small decoder."""

import pytest
import torch

from lvlm_prune.methods.allocation import DASAllocation, ECoFLaPAllocation, OWLAllocation
from lvlm_prune.methods.tokens import Tokens


def test_das_scores_are_the_released_densities(mini_net):
    """Released: the sum of three terms, here their mean."""
    allocation = mini_net.survey(DASAllocation(pairs="positive"))
    scores = mini_net.by_linear(allocation.survey_end(lambda values: values)["diversity"])
    for key, density in mini_net.numbers["density"].items():
        assert 3 * scores[key] == pytest.approx(density, abs=2e-5), key


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
def test_das_allocation_is_the_released_one(mini_net, sparsity):
    """Within 4 weights, but for one Linear to which the released code adds its rounding excess of about 10 weights."""
    allocation = mini_net.survey(DASAllocation(pairs="positive"))
    shapes = {key.removesuffix(".weight"): shape for key, shape in mini_net.shapes.items()}
    found = mini_net.by_linear(allocation.allocate(shapes, sparsity))
    released = mini_net.numbers[f"das_sparsity_s{sparsity}"]
    weights = {key: rows * columns for key, (rows, columns) in mini_net.shapes.items()}
    off = {key: abs(found[key] - released[key]) * weights[key] for key in mini_net.keys}
    assert sorted(off.values())[-2] <= 4
    assert max(off.values()) <= 20
    assert released[max(off, key=off.get)] == min(
        value for key, value in released.items() if weights[key] == max(weights.values())
    )
    mean = sum(found[key] * weights[key] for key in weights) / sum(weights.values())
    assert mean == pytest.approx(sparsity, abs=1e-9)


def test_das_per_block_gives_a_block_one_sparsity_and_all_token_ignores_modalities(mini_net):
    shapes = {key.removesuffix(".weight"): shape for key, shape in mini_net.shapes.items()}
    linears = mini_net.survey(DASAllocation())
    scores = linears.survey_end(lambda values: values)["diversity"]
    per_block = mini_net.survey(DASAllocation(variant="per_block")).allocate(shapes, 0.5)
    means = []
    for index in range(4):
        names = [name for name in shapes if name.startswith(f"model.layers.{index}.")]
        assert len({per_block[name] for name in names}) == 1
        means.append((sum(scores[name] for name in names) / 7, per_block[names[0]]))
    assert [value for _, value in sorted(means)] == sorted((value for _, value in means), reverse=True)
    kept_per_score = [(0.6 - value) / mean for mean, value in means]
    assert kept_per_score == pytest.approx([kept_per_score[0]] * 4)
    all_token = mini_net.survey(DASAllocation(variant="all_token")).survey_end(lambda values: values)["diversity"]
    assert all_token != scores
    outputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    one = DASAllocation(variant="all_token")
    for visual in (torch.tensor([True] * 3 + [False] * 3), torch.tensor([True] + [False] * 5)):
        one.survey_sample("0", Tokens(outputs, outputs, visual, outputs={"q_proj": outputs}), {"q_proj": outputs})
    one.survey_block_end("0", {"q_proj": torch.nn.Linear(4, 4)}, lambda values: values)
    found = one.survey_end(lambda values: values)["diversity"]["0.q_proj"]
    unit = torch.nn.functional.normalize(outputs, dim=-1)
    assert found == pytest.approx(1 - ((unit @ unit.T).sum().item() - 6) / 30, abs=1e-6)


def test_owl_ratios_are_the_released_ones(mini_net):
    allocation = mini_net.survey(OWLAllocation())
    ratios = allocation.survey_end(lambda values: values)["outlier_ratio"]
    assert [100 * ratio for ratio in ratios.values()] == pytest.approx(mini_net.numbers["owl_outlier_ratio_percent"])


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
def test_owl_prunes_less_where_outliers_are_more(mini_net, sparsity):
    """The released sparsities mirrored at the target: that code has the sign inverted."""
    allocation = mini_net.survey(OWLAllocation())
    found = mini_net.by_linear(
        allocation.allocate({key.removesuffix(".weight"): shape for key, shape in mini_net.shapes.items()}, sparsity)
    )
    for key, released in mini_net.numbers[f"owl_sparsity_s{sparsity}"].items():
        assert found[key] == pytest.approx(2 * sparsity - released, abs=1e-6)
    assert max(found.values()) - min(found.values()) == pytest.approx(0.16)


def test_ecoflap_allocation_is_the_released_one_for_its_importances(mini_net):
    allocation = ECoFLaPAllocation()
    importance = mini_net.numbers["olmezo_importance_seed0"]
    allocation.use_survey({"importance": {key.removesuffix(".weight"): value for key, value in importance.items()}})
    shapes = {key.removesuffix(".weight"): shape for key, shape in mini_net.shapes.items()}
    found = mini_net.by_linear(allocation.allocate(shapes, 0.5))
    for key, released in mini_net.numbers["ecoflap_sparsity_s0.5_seed0"].items():
        assert found[key] == pytest.approx(released, abs=4 / (4 * 32 * 32))


@pytest.mark.parametrize("make", [lambda: DASAllocation(), lambda: OWLAllocation()])
def test_findings_of_shares_of_the_samples_add_up(mini_net, make):
    """What two processes find together is what one finds: every sum over processes is of float64 tensors."""
    whole = mini_net.survey(make()).survey_end(lambda values: values)
    recorded = []
    mini_net_survey = make()
    # The first process' sums, one per call, are replayed as what the other process contributes.
    other = make()
    original = other.survey_block_end
    other.survey_block_end = lambda block, linears, sums: original(  # type: ignore[method-assign]
        block, linears, lambda values: (recorded.append(values.clone()), values)[1]
    )
    mini_net.survey(other, samples=[1, 3])
    replay = iter(recorded)
    second = mini_net_survey.survey_block_end
    mini_net_survey.survey_block_end = lambda block, linears, sums: second(  # type: ignore[method-assign]
        block, linears, lambda values: values + next(replay)
    )
    together = mini_net.survey(mini_net_survey, samples=[0, 2]).survey_end(lambda values: values)
    for key, values in whole.items():
        assert together[key] == pytest.approx(values, rel=1e-9)
