"""Magnitude removes what the released code removes, less the one weight too many per comparison group."""

import pytest
import torch

from lvlm_prune.methods.patterns import Unstructured, parse_pattern
from lvlm_prune.methods.scorers import MagnitudeScorer


@pytest.mark.parametrize("tag", ["s0.5", "s0.6", "s0.7"])
def test_whole_matrix(tag, reference):
    golden = reference("magnitude")
    weight, released = golden["W"], golden[f"mask.{tag}"]
    _, mask = MagnitudeScorer(group="layer").prune(weight, None, float(tag[1:]), Unstructured())
    assert int(mask.sum()) == int(weight.numel() * float(tag[1:])) == int(released.sum()) - 1
    assert not (mask & ~released).any()
    assert weight[released & ~mask].abs() == weight[released].abs().max()


@pytest.mark.parametrize(("tag", "pattern"), [("2of4", "2:4"), ("4of8", "4:8"), ("1of4", "3:4")])
def test_n_of_m(tag, pattern, reference):
    golden = reference("magnitude")
    _, mask = MagnitudeScorer().prune(golden["W"], None, 0.5, parse_pattern(pattern))
    assert torch.equal(mask, golden[f"mask.{tag}"])


def test_rows_lose_the_same_number_each(reference):
    _, mask = MagnitudeScorer().prune(reference("magnitude")["W"], None, 0.6, Unstructured())
    assert set(mask.sum(dim=1).tolist()) == {57}
