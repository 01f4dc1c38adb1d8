"""SparseGPT gives the weights of the released code, and says what it had to do to get there."""

import pytest
import torch

from lvlm_prune.methods.patterns import SemiStructured, Unstructured, parse_pattern
from lvlm_prune.methods.scorers import SparseGPTScorer, WandaScorer
from lvlm_prune.methods.statistics import ChannelNorm, Gram

TAGS = ["s0.5", "s0.6", "s0.7", "2of4", "4of8"]


def pattern_of(tag: str):
    if tag.startswith("s"):
        return Unstructured(), float(tag[1:])
    pattern = parse_pattern(tag.replace("of", ":"))
    return pattern, pattern.sparsity


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(("key", "block_size"), [("W_out", 128), ("W_out_bs32", 32)])
def test_weights_of_the_released_code(tag, key, block_size, reference, gathered):
    golden = reference("sparsegpt")
    pattern, sparsity = pattern_of(tag)
    scorer = SparseGPTScorer(block_size)
    pruned, mask = scorer.prune(golden["W"], gathered(Gram, golden["X"]), sparsity, pattern)
    torch.testing.assert_close(pruned, golden[f"{key}.{tag}"], rtol=1e-4, atol=1e-7)
    assert torch.equal(mask, golden[f"{key}.{tag}"] == 0)
    if key == "W_out":
        assert torch.equal(mask, golden[f"mask.{tag}"])
    for count in scorer.expected_zeros((64, 96), sparsity, pattern):
        assert set(count.of(pruned).tolist()) == {count.least}


def test_dead_columns_of_the_released_code(reference, gathered):
    golden = reference("sparsegpt")
    tokens = golden["X"].clone()
    tokens[..., 5] = 0
    gram = gathered(Gram, tokens)
    pruned, mask = SparseGPTScorer().prune(golden["W"], gram, 0.5, Unstructured())
    torch.testing.assert_close(pruned, golden["W_out_deadcol5.s0.5"], rtol=1e-4, atol=1e-7)
    assert mask[:, 5].all()
    assert SparseGPTScorer().notes(gram, mask, 0.5) == {"dead_columns": 1}


def test_more_dead_columns_than_the_target_asks_for(gathered):
    tokens = random(40, 16)
    tokens[:, :10] = 0
    for pattern, sparsity in [(Unstructured(), 0.25), (SemiStructured(3, 4), 0.25)]:
        pruned, mask = SparseGPTScorer().prune(random(8, 16, seed=1), gathered(Gram, [tokens]), sparsity, pattern)
        assert mask[:, :10].all()
        assert torch.isfinite(pruned).all()
        for count in SparseGPTScorer().expected_zeros((8, 16), sparsity, pattern):
            assert (count.of(pruned) >= count.least).all()


@pytest.mark.parametrize("tag", TAGS)
def test_outputs_change_less_than_with_wanda(tag, reference, gathered):
    golden = reference("sparsegpt")
    pattern, sparsity = pattern_of(tag)
    weight, tokens = golden["W"], golden["X"].flatten(0, 1).double()

    def error(scorer, kind):
        pruned, _ = scorer.prune(weight, gathered(kind, golden["X"]), sparsity, pattern)
        return ((pruned - weight).double() @ tokens.T).square().sum()

    assert error(SparseGPTScorer(), Gram) < 0.7 * error(WandaScorer(), ChannelNorm)


def test_one_pruned_column_leaves_the_least_squares_solution(gathered):
    """What the update promises: the other columns are the best ones for the tokens, without approximation."""
    tokens, weight = random(200, 12), random(5, 12, seed=1)
    weight[:, 0] *= 1e-3
    pruned, mask = SparseGPTScorer(damping=1e-12).prune(weight, gathered(Gram, [tokens]), 4 / 60, Unstructured())
    assert mask.nonzero()[:, 1].unique().tolist() == [0]
    target = tokens.double() @ weight.double().T
    best = torch.linalg.lstsq(tokens[:, 1:].double(), target).solution.T
    torch.testing.assert_close(pruned[:, 1:].double(), best, rtol=1e-5, atol=1e-6)


def test_the_factor_is_the_upper_cholesky_factor_of_the_damped_inverse(reference, gathered):
    gram = gathered(Gram, reference("sparsegpt")["X"])
    damped = gram.value + 0.01 * gram.value.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(gram.inverse_factor(0.01).upper, expected.float(), rtol=1e-4, atol=1e-7)


def test_with_n_of_m_the_block_size_does_not_matter(reference, gathered):
    """Also where it is no multiple of M, or smaller than M."""
    golden = reference("sparsegpt")
    gram = gathered(Gram, golden["X"])
    whole, _ = SparseGPTScorer(128).prune(golden["W"], gram, 0.5, SemiStructured(4, 8))
    for block_size in (1, 13, 30):
        blocks, mask = SparseGPTScorer(block_size).prune(golden["W"], gram, 0.5, SemiStructured(4, 8))
        torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-6)
        assert set(mask.unflatten(1, (-1, 8)).sum(dim=2).flatten().tolist()) == {4}


def test_a_last_block_of_other_width(reference, gathered):
    golden = reference("sparsegpt")
    scorer = SparseGPTScorer(36)
    pruned, _ = scorer.prune(golden["W"], gathered(Gram, golden["X"]), 0.5, Unstructured())
    counts = scorer.expected_zeros((64, 96), 0.5, Unstructured())
    assert [count.least for count in counts] == [36 * 32 + 1, 36 * 32 + 1, 24 * 32 + 1]
    assert [count.of(pruned).tolist() for count in counts] == [[count.least] for count in counts]


def test_a_target_of_zero_leaves_the_weight_alone(reference, gathered):
    golden = reference("sparsegpt")
    pruned, mask = SparseGPTScorer().prune(golden["W"], gathered(Gram, golden["X"]), 0.0, Unstructured())
    assert torch.equal(pruned, golden["W"])
    assert not mask.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_hold_no_negative_zero(dtype, gathered):
    weight = random(32, 64) * (1e-7 if dtype == torch.float16 else 1.0)
    pruned, mask = SparseGPTScorer().prune(weight.to(dtype), gathered(Gram, [random(90, 64)]), 0.5, Unstructured())
    assert pruned.dtype == dtype
    assert (pruned[mask] == 0).all()
    assert not torch.signbit(pruned[pruned == 0]).any()


# ---- statistics ------------------------------------------------------------------------------------------------------
def test_token_weights_scale_tokens(gathered):
    samples = list(random(3, 20, 8))
    weights = list(random(3, 20, seed=1).abs())
    weights[0][:7] = 0
    scaled = [tokens * weight[:, None] for tokens, weight in zip(samples, weights)]
    for kind in (Gram, ChannelNorm):
        expected = sum(tokens.double().T @ tokens.double() for tokens in scaled)
        expected = expected if kind is Gram else expected.diagonal()
        torch.testing.assert_close(gathered(kind, samples, weights).value, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_one_equal_the_choice_of_all_tokens(reference, gathered):
    samples = reference("sparsegpt")["X"].bfloat16()
    ones = [torch.ones(37)] * len(samples)
    for kind in (Gram, ChannelNorm):
        assert torch.equal(gathered(kind, samples, ones).value, gathered(kind, samples).value)


def test_tokens_that_are_not_chosen_leave_no_trace(gathered):
    tokens, chosen = random(30, 8), random(30, seed=1) > 0
    spoiled = tokens.clone()
    spoiled[~chosen] = float("nan")
    torch.testing.assert_close(gathered(Gram, [spoiled], [chosen]).value, gathered(Gram, [tokens[chosen]]).value)
    assert not gathered(Gram, [spoiled], [torch.zeros_like(chosen)]).value.any()


def test_one_factorisation_serves_all_linears_of_a_site(monkeypatch, gathered):
    factorise, calls = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *args, **out: calls.append(1) or factorise(*args, **out))
    gram, scorer = gathered(Gram, [random(50, 8)]), SparseGPTScorer()
    for seed in (1, 2, 3):
        _, mask = scorer.prune(random(4, 8, seed=seed), gram, 0.5, Unstructured())
        scorer.notes(gram, mask, 0.5)
    assert len(calls) == 1
    gram.tensors()[0].mul_(2)  # as a sum over processes does
    scorer.prune(random(4, 8), gram, 0.5, Unstructured())
    assert len(calls) == 2


# ---- singular Gram matrices ------------------------------------------------------------------------------------------
def test_damping_that_had_to_be_raised_is_reported(gathered):
    """Fewer tokens than channels, and nothing to make up for it."""
    gram, scorer = gathered(Gram, [random(5, 32)]), SparseGPTScorer(damping=0.0)
    pruned, mask = scorer.prune(random(8, 32, seed=1), gram, 0.5, Unstructured())
    notes = scorer.notes(gram, mask, 0.5)
    assert 0 < notes["damping"] <= 0.01
    assert torch.isfinite(pruned).all()
    line = scorer.summary({"layers.0.o_proj": notes, "layers.1.o_proj": {}})
    assert "singular Gram matrix at 1 Linear" in line
    assert "from 0 to" in line
    assert "layers.0.o_proj" in line
    assert "\n" not in line


def test_a_nearly_singular_gram_matrix_is_reported_too():
    """Two channels that differ by less than float32 sums can tell: float64 would factorise it, and amplify noise."""
    tokens = random(50, 8).double()
    tokens[:, 1] = tokens[:, 0] + 1e-5 * tokens[:, 1]
    gram, scorer = Gram(8), SparseGPTScorer(damping=0.0)
    gram.tensors()[0].add_(tokens.T @ tokens)
    assert not torch.linalg.cholesky_ex(gram.value).info
    pruned, mask = scorer.prune(random(4, 8, seed=1), gram, 0.5, Unstructured())
    assert scorer.notes(gram, mask, 0.5)["damping"] > 0
    assert pruned.abs().max() < 10


def test_the_default_damping_is_enough_for_a_single_token(gathered):
    gram, scorer = gathered(Gram, [random(1, 256)]), SparseGPTScorer()
    _, mask = scorer.prune(random(8, 256, seed=1), gram, 0.5, Unstructured())
    assert scorer.notes(gram, mask, 0.5) == {}
    assert scorer.summary({"layers.0.o_proj": {}}) == ""


@pytest.mark.parametrize(("value", "problem"), [(float("nan"), "NaN"), (float("inf"), "NaN"), (0.0, "zero")])
def test_a_gram_matrix_that_says_nothing_is_an_error(value, problem, gathered):
    with pytest.raises(FloatingPointError, match=problem):
        SparseGPTScorer().prune(random(4, 8), gathered(Gram, [torch.full((3, 8), value)]), 0.5, Unstructured())


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"block_size": 0}, "`block_size` 0: "),
        ({"damping": -0.1}, "`damping` -0.1: "),
        ({"damping": float("nan")}, "`damping` nan: "),
        ({"damping": float("inf")}, "`damping` inf: "),
        ({"damping": 1e308}, r"`damping` 1e\+308: must be at most"),
    ],
)
def test_bad_options(arguments, option):
    with pytest.raises(ValueError, match=f"^{option}"):
        SparseGPTScorer(**arguments)
