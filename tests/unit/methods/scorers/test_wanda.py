"""Wanda, its variant and MLLM-Pruner's aggregated score give the masks of the released code and of the oracle."""

import json

import numpy as np
import pytest
import torch

from lvlm_prune.methods.patterns import SemiStructured, Unstructured, parse_pattern
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.methods.statistics import ChannelNorm
from tests.unit.methods.scorers.conftest import GOLDEN

PATTERNS = {"2of4": "2:4", "4of8": "4:8", "1of4": "3:4"}


@pytest.mark.parametrize("tag", ["s0.5", "s0.6", "s0.7", *PATTERNS])
def test_masks_of_the_released_code(tag, reference, gathered):
    golden = reference("wanda")
    pattern = parse_pattern(PATTERNS[tag]) if tag in PATTERNS else Unstructured()
    sparsity = pattern.sparsity if isinstance(pattern, SemiStructured) else float(tag[1:])
    norm = gathered(ChannelNorm, golden["X"])
    pruned, mask = WandaScorer().prune(golden["W"], norm, sparsity, pattern)
    assert torch.equal(mask, golden[f"mask.{tag}"])
    assert torch.equal(pruned, golden["W"].masked_fill(mask, 0))


@pytest.mark.parametrize("tag", ["s0.5", "s0.6", "s0.7"])
def test_masks_of_the_released_variant(tag, reference, gathered):
    golden = reference("wanda")
    sparsity = float(tag[1:])
    scorer = WandaScorer(variant=True)
    norm = gathered(ChannelNorm, golden["X"])
    _, mask = scorer.prune(golden["W"], norm, sparsity, Unstructured())
    assert torch.equal(mask, golden[f"mask_variant.{tag}"])
    assert len(set(mask.sum(dim=1).tolist())) > 5
    assert scorer.notes(norm, mask, sparsity) == {}


def test_the_variant_says_where_bisection_missed_the_target():
    scorer, norm = WandaScorer(variant=True), ChannelNorm(4)
    norm.add(torch.ones(1, 4), torch.ones(1))
    _, mask = scorer.prune(torch.ones(2, 4), norm, 0.4, Unstructured())
    assert scorer.notes(norm, mask, 0.4) == {"missed_target": pytest.approx(mask.float().mean().item() - 0.4)}


def test_the_variant_stands_weights_without_any_importance():
    norm = ChannelNorm(8)
    norm.add(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(5))
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    pruned, mask = WandaScorer(variant=True).prune(weight, norm, 0.5, Unstructured())
    assert mask[2].all()
    assert (pruned[[0, 1, 3, 4, 5]].abs().sum(dim=1) > 0).all()


def test_the_variant_has_no_pattern():
    with pytest.raises(ValueError, match=r"`variant` True: cannot be used with 2:4"):
        WandaScorer(variant=True).check(SemiStructured(2, 4))
    WandaScorer(variant=True).check(Unstructured())
    WandaScorer().check(SemiStructured(2, 4))


def contribution_norms(oracle, reading="default") -> dict[str, ChannelNorm]:
    """Channel norms of each data set, its tokens weighted by their contributions."""
    norms: dict[str, ChannelNorm] = {}
    for key in (key for key in oracle if key.startswith("X.")):
        name = key.split(".")[1]
        norm = norms.setdefault(name, ChannelNorm(oracle[key].shape[1]))
        norm.add(torch.from_numpy(oracle[key]), torch.from_numpy(oracle[key.replace("X.", f"{reading}.C.", 1)]))
    return norms


def test_real_token_weights_give_the_aggregated_score_of_mllm_pruner():
    """Its Eqs. 9 to 12: one statistic per data set, a mean over samples, weighted by the set's share of samples."""
    oracle = np.load(GOLDEN / "mllm_pruner" / "oracle.npz")
    alpha = json.loads((GOLDEN / "mllm_pruner" / "oracle.json").read_text())["alpha"]
    sizes = {name: sum(key.startswith(f"X.{name}.") for key in oracle) for name in alpha}
    norms = contribution_norms(oracle)
    for name, norm in norms.items():
        expected = torch.from_numpy(oracle[f"default.samples.S.{name}"])
        torch.testing.assert_close(norm.value / sizes[name], expected, rtol=1e-5, atol=0)
    # Weighted by shares of samples, per-set means add up to the sum over all samples: one pooled statistic does.
    pooled = ChannelNorm(10)
    pooled.value += sum(norm.value for norm in norms.values())
    weight = torch.from_numpy(oracle["W"])
    score = WandaScorer().score(weight, pooled).double() / sum(sizes.values()) ** 0.5
    torch.testing.assert_close(score, torch.from_numpy(oracle["default.samples.I"]), rtol=1e-5, atol=0)
    _, mask = WandaScorer().prune(weight, pooled, 0.5, Unstructured())
    assert torch.equal(mask, torch.from_numpy(oracle["default.samples.mask50"]))
