"""The two things of the training that PyTorch has too: equal to PyTorch's."""

import copy

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from lvlm_prune.demo.making.attention import MatmulAttention
from lvlm_prune.demo.making.optimizer import MasterAdam


def test_attention_has_the_gradient_of_softmax_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.where(torch.ones(5, 5).tril() > 0, 0.0, -1e4).double().expand(2, 1, 5, 5)
    assert gradcheck(lambda *tensors: MatmulAttention.apply(*tensors, mask), (query, key, value))
    torch.testing.assert_close(
        MatmulAttention.apply(query * 0.5, key, value, mask),
        scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5),
    )


def test_master_adam_is_adamw_with_clipping():
    torch.manual_seed(0)
    ours = torch.nn.Linear(6, 4)
    theirs = copy.deepcopy(ours)
    groups = [{"params": [theirs.weight], "weight_decay": 0.05}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    optimizer = MasterAdam(ours.parameters(), lr=0.01)
    for _ in range(20):
        inputs = torch.randn(8, 6)
        for model, step in ((ours, optimizer), (theirs, reference)):
            step.zero_grad()
            (10 * model(inputs).square().mean()).backward()
            if model is theirs:
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            step.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-6, rtol=1e-5)


def test_small_updates_are_not_lost_in_bfloat16():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdam([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.item() == pytest.approx(0.98, abs=0.005)


def test_optimizer_resumes(tmp_path):
    def run(steps, state=None):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.bfloat16))
        optimizer = MasterAdam([weight], lr=0.01)
        if state is not None:
            optimizer.load_state_dict(torch.load(state))
            weight.data.copy_(optimizer.state["flat"]["master"])  # type: ignore[index]
        for _ in range(steps):
            weight.grad = weight.detach().clone()
            optimizer.step()
        return weight, optimizer

    straight, _ = run(6)
    _, optimizer = run(3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed, _ = run(3, tmp_path / "state.pt")
    torch.testing.assert_close(resumed, straight, atol=0.0, rtol=0.0)
