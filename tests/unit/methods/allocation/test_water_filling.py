"""Water-filling against the released code, and as a property."""

import json

import pytest

from lvlm_prune.methods.allocation.base import block_of
from lvlm_prune.methods.allocation.water_filling import fill_groups, water_filling
from tests.conftest import REPOSITORY

TAMP = REPOSITORY / "tests" / "golden" / "tamp"
REFERENCE = json.loads((TAMP / "return_sparsity.json").read_text())
GROUPS = {"layer": lambda name: name, "block": lambda name: name.rsplit(".", 2)[0], "decoder": block_of}


@pytest.mark.parametrize("model", REFERENCE["shapes"])
def test_the_released_code_on_every_case(model):
    """Each group within max(1e-5, 4 weights), the total exact.

    The released code rounds up to whole weights and takes what is too much from the group that keeps most, but with the
    wrong sign: that group gets the excess a second time. On the smallest model this is 13 weights; it is undone here
    before the comparison, from the released total alone.
    """
    shapes = {name: tuple(shape) for name, shape in REFERENCE["shapes"][model].items()}
    importance = json.loads((TAMP / f"importance_{model}.json").read_text())
    cases = [case for case in REFERENCE["cases"] if case["model"] == model]
    assert len(cases) == 54
    for case in cases:
        groups = {name: GROUPS[case["granularity"]](name) for name in shapes}
        scores = dict(zip(shapes, importance[case["importance"]]))
        target = case["sparsity"]
        found = fill_groups(scores, shapes, groups, target, case["max_sparsity"], case["aggregate"] == "avg")
        sizes, kept, expected = {}, {}, {}
        for name, released in zip(shapes, case["sparsity_out"]):
            rows, columns = shapes[name]
            sizes[groups[name]] = sizes.get(groups[name], 0) + rows * columns
            kept[groups[name]], expected[groups[name]] = 1 - found[name], 1 - released
        total = sum(sizes.values())
        assert sum(kept[group] * size for group, size in sizes.items()) == pytest.approx(total * (1 - target), rel=1e-9)
        surplus = sum(expected[group] * size for group, size in sizes.items()) - int(total * (1 - target))
        most = max(sizes, key=lambda group: expected[group] * sizes[group])
        if model == "tiny4x64":
            expected[most] -= surplus / 2 / sizes[most]
        for group, size in sizes.items():
            assert kept[group] == pytest.approx(expected[group], abs=max(1e-5, 4 / size)), (case, group)


def test_all_scores_zero_is_uniform():
    assert water_filling([0.0, 0.0], [10, 30], 0.5, 0.6) == pytest.approx([0.5, 0.5])


def test_what_full_groups_cannot_hold_goes_to_groups_without_a_score():
    assert water_filling([1.0, 0.0, 0.0], [10, 10, 30], 0.5, 1.0) == pytest.approx([0.0, 0.625, 0.625])


def test_a_target_at_the_maximum_is_uniform_and_one_above_it_is_refused():
    assert water_filling([5.0, 1.0], [7, 9], 0.6, 0.6) == pytest.approx([0.6, 0.6])
    with pytest.raises(ValueError, match=r"`sparsity` 0.7: cannot be reached: no Linear may get more than 0.6"):
        water_filling([5.0, 1.0], [7, 9], 0.7, 0.6)
