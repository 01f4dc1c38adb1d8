"""Budgets of the asymmetric pool: adaptive, fixed, matched to drift's; and the share of text that is kept."""

import math

import pytest
import torch

from lvlm_prune.methods.pools import AsymmetricPool
from lvlm_prune.methods.saliency import AttentionSaliency, DiversitySaliency, DriftSaliency, RandomSaliency
from tests.unit.methods.pools.conftest import make_tokens

SALIENCIES = [DriftSaliency(), AttentionSaliency(), DiversitySaliency(), RandomSaliency()]


def alone(values):
    """Sum over the one process that there is."""
    return values


def samples_of_a_block(block):
    return [make_tokens(text=5 + 3 * i, image=[0, 30, 1, 25, 40][i], seed=10 * block + i) for i in range(5)]


@pytest.mark.parametrize("saliency", SALIENCIES, ids=lambda saliency: saliency.name)
def test_a_fixed_budget_takes_k_of_each_sample_or_all(saliency):
    pool = AsymmetricPool(saliency, k=7)
    samples = samples_of_a_block(0)
    selections = [pool.select(tokens) for tokens in samples]
    assert pool.cutoffs(alone) == [0, 7, 1, 7, 7]
    for tokens, selection in zip(samples, selections):
        assert len(selection.candidates) == min(7, tokens.num_visual)
        assert tokens.visual[selection.candidates].all()
        assert torch.equal(selection.weights, tokens.text)


@pytest.mark.parametrize("saliency", SALIENCIES, ids=lambda saliency: saliency.name)
def test_no_more_candidates_are_held_than_can_ever_count_and_never_fewer(saliency):
    for alpha in (0.0, 0.5, 1.0, 4.0):
        pool = AsymmetricPool(saliency, alpha=alpha)
        samples = samples_of_a_block(0)
        held = [len(pool.select(tokens).candidates) for tokens in samples]
        mean = torch.cat([saliency(tokens) for tokens in samples]).double().mean().item()
        expected = [min(tokens.num_visual, math.floor(alpha * mean * tokens.num_text)) for tokens in samples]
        budgets = pool.cutoffs(alone)
        assert budgets == expected
        assert all(k <= candidates for k, candidates in zip(budgets, held))


@pytest.mark.parametrize("share", [1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0])
def test_text_retention_keeps_the_text_that_moves_most(share):
    tokens = make_tokens(text=10)
    selection = AsymmetricPool(text_retention=share).select(tokens)
    kept = selection.weights
    assert int(kept.sum()) == round(10 * share)
    assert not (kept & ~tokens.text).any()
    drift = 1 - torch.cosine_similarity(tokens.hidden_in, tokens.hidden_out, dim=-1)
    if 0 < share < 1:
        assert drift[kept].min() > drift[tokens.text & ~kept].max()
    whole = AsymmetricPool().select(tokens)
    assert torch.equal(selection.candidates, whole.candidates)


def surveyed(saliency, blocks=4, **options):
    pool = AsymmetricPool(saliency, match_total="drift", **options)
    assert pool.wants_survey
    assert pool.survey_needs == saliency.needs
    for block in range(blocks):
        for tokens in samples_of_a_block(block):
            pool.survey_sample(f"layers.{block}", tokens, {})
        pool.survey_block_end(f"layers.{block}", {}, alone)
    return pool, pool.survey_end(alone)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.2}, {"rounding": "released"}], ids=str)
@pytest.mark.parametrize("saliency", SALIENCIES, ids=lambda saliency: saliency.name)
def test_the_matched_total_is_that_of_drift(saliency, options):
    pool, findings = surveyed(saliency, **options)
    pool.use_survey(findings)
    drift = AsymmetricPool(DriftSaliency(), **options)
    total = reference = 0
    for block in range(4):
        for tokens in samples_of_a_block(block):
            pool.select(tokens)
            drift.select(tokens)
        total += sum(pool.cutoffs(alone))
        reference += sum(drift.cutoffs(alone))
    assert findings["visual_tokens"] == total
    assert findings["visual_tokens_of_drift"] == reference
    # Samples of different length step at different factors: only several steps at once could keep the two apart.
    assert abs(total - reference) <= 1
    assert reference > 0


def test_matching_drift_with_itself_changes_nothing():
    _, findings = surveyed(DriftSaliency())
    assert findings["visual_tokens"] == findings["visual_tokens_of_drift"]


def test_matching_without_any_visual_token():
    pool = AsymmetricPool(AttentionSaliency(), match_total="drift")
    pool.survey_sample("layers.0", make_tokens(image=0), {})
    pool.survey_block_end("layers.0", {}, alone)
    assert pool.survey_end(alone) == {"factor": 1.0, "visual_tokens": 0, "visual_tokens_of_drift": 0}


def test_without_matching_no_survey_runs():
    assert not AsymmetricPool(AttentionSaliency()).wants_survey


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, r"`k` -1: must be 0 or larger"),
        ({"text_retention": 1.2}, r"`text_retention` 1.2: must lie between 0 and 1"),
        ({"text_retention": -0.1}, r"`text_retention` -0.1: must lie between 0 and 1"),
        ({"match_total": "attention"}, r"`match_total` attention: must be empty or `drift`"),
        ({"match_total": "drift", "k": 3}, r"`match_total` drift: scales the budget, which `k` fixes"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricPool(**options)


def test_where_drift_buys_nothing_the_other_saliency_buys_nothing():
    _, findings = surveyed(DiversitySaliency(), alpha=0.02)
    assert findings["visual_tokens_of_drift"] == findings["visual_tokens"] == 0
    assert findings["factor"] > 0


def test_a_budget_that_is_always_zero_ends_the_search():
    _, findings = surveyed(DiversitySaliency(), alpha=0.0)
    assert findings["visual_tokens"] == findings["visual_tokens_of_drift"] == 0


def test_a_saliency_that_is_not_finite_names_block_and_sample():
    class Infinite(DriftSaliency):
        def __call__(self, tokens):
            return super().__call__(tokens) / 0

    pool = AsymmetricPool(Infinite())
    pool.select(samples_of_a_block(0)[1])
    with pytest.raises(FloatingPointError, match=r"NaN or infinity in the drift .* block 0 for calibration sample 0"):
        pool.cutoffs(alone)


@pytest.mark.parametrize("rounding", ["floor", "released"])
def test_a_budget_beyond_any_number_is_all_visual_tokens(rounding):
    pool = AsymmetricPool(alpha=1e308, rounding=rounding)
    assert pool.held_tokens(text=60, visual=25) == 25
