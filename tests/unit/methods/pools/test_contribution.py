"""MLLM-Pruner's contributions against the float64 oracle of the paper's equations."""

import numpy as np
import pytest
import torch

from lvlm_prune.methods.pools import ContributionPool
from lvlm_prune.methods.pools.contribution import singular_contributions
from lvlm_prune.methods.tokens import Tokens
from tests.conftest import REPOSITORY

ORACLE = np.load(REPOSITORY / "tests" / "golden" / "mllm_pruner" / "oracle.npz")
SAMPLES = sorted(key.removeprefix("A.") for key in ORACLE if key.startswith("A."))


def tokens_of(sample):
    attention = torch.from_numpy(ORACLE[f"A.{sample}"]).mean(0).float()
    none = torch.zeros(len(attention), dtype=torch.bool)
    empty = torch.zeros(len(attention), 1)
    return Tokens(empty, empty, none, attention_map=attention, attention_mean=attention.mean(0))


@pytest.mark.parametrize(("beta", "reading"), [(0.3, "default"), (0.0, "beta0"), (1.0, "beta1")])
@pytest.mark.parametrize("sample", SAMPLES)
def test_contributions(sample, beta, reading):
    weights = ContributionPool(beta).select(tokens_of(sample)).weights
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), ORACLE[f"{reading}.C.{sample}"], rtol=1e-5, atol=1e-7)


def test_masks_of_the_whole_method():
    """Eqs. 9 to 12: weighted statistic over samples, then |W| sqrt(S), half of each row."""
    norms = np.zeros(10)
    for sample in SAMPLES:
        weights = ContributionPool().select(tokens_of(sample)).weights.double().numpy()
        norms += (weights[:, None] ** 2 * ORACLE[f"X.{sample}"] ** 2).sum(0)
    score = np.abs(ORACLE["W"]) * np.sqrt(norms)
    mask = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(mask, score.argsort(axis=1, kind="stable")[:, :5], True, axis=1)
    assert np.array_equal(mask, ORACLE["default.samples.mask50"])


def test_the_eigenvectors_give_what_the_singular_value_decomposition_gives():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 200, 200, generator=generator) * 3
    hidden = ~torch.ones(200, 200, dtype=torch.bool).tril()
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
    left, values, _ = torch.linalg.svd(attention.double())
    torch.testing.assert_close(singular_contributions(attention), left.abs() @ values, rtol=1e-6, atol=0)


def test_only_what_beta_asks_for_is_computed():
    assert ContributionPool(1.0).needs == {"attention_mean"}
    assert ContributionPool(0.3).needs == {"attention_map"}


def test_weights_lie_between_zero_and_one_whatever_the_sample(any_tokens):
    for beta in (0.0, 0.3, 1.0):
        weights = ContributionPool(beta).select(any_tokens).weights
        assert weights.shape == any_tokens.visual.shape
        assert ((weights >= 0) & (weights <= 1)).all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r"`beta` .*: must lie between 0 and 1"):
        ContributionPool(beta)
