"""TAMP's ablations."""

from dataclasses import replace

import pytest
import torch

from lvlm_prune.methods.pools import AttendedPool, EarlyVisualPool, RandomTokensPool
from tests.unit.methods.pools.conftest import make_tokens


def test_attended_tokens_lie_above_the_mean(any_tokens):
    weights = AttendedPool().select(any_tokens).weights
    attention = any_tokens.attention_last
    assert weights.any()
    if len(attention) > 1:
        assert attention[weights].min() > attention.mean() >= attention[~weights].max()


def test_uniform_attention_leaves_one_token():
    tokens = make_tokens()
    tokens.attention_last[:] = 1 / 15
    assert AttendedPool().select(tokens).weights.sum() == 1


def test_random_tokens_are_as_many_as_asked_for_or_all(any_tokens):
    count = len(any_tokens.visual)
    for k in (1, 5, 100):
        assert RandomTokensPool(k).select(any_tokens).weights.sum() == min(k, count)


def test_random_tokens_depend_on_seed_block_and_sample_only():
    from dataclasses import replace

    tokens = make_tokens(text=20, image=30)
    chosen = RandomTokensPool(10).select(tokens).weights
    assert torch.equal(chosen, RandomTokensPool(10).select(tokens).weights)
    for other in (replace(tokens, block=1), replace(tokens, sample=1)):
        assert not torch.equal(chosen, RandomTokensPool(10).select(other).weights)
    assert not torch.equal(chosen, RandomTokensPool(10, seed=1).select(tokens).weights)


def test_no_tokens_at_all_are_refused():
    with pytest.raises(ValueError, match=r"`k` 0: must be 1 or larger"):
        RandomTokensPool(0)


def test_visual_tokens_count_in_the_first_blocks_only():
    for block, counted in ((0, 50), (1, 50), (2, 20)):
        tokens = replace(make_tokens(text=20, image=30), block=block)
        assert int(EarlyVisualPool(2).select(tokens).weights.sum()) == counted
    with pytest.raises(ValueError, match=r"`blocks`"):
        EarlyVisualPool(-1)
