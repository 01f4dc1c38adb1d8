"""Masked LoRA: exact gradients, nothing kept for backward, zeros that survive merging."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lvlm_prune.methods.patterns import SemiStructured
from lvlm_prune.recovery import masked_lora_linear, masked_weight, sparse_lora_config


def problem(dtype=torch.float64, out=6, width=8, rank=2, tokens=(2, 3), seed=0):
    """(x, W, bias, A, B) with half of W pruned, in 2:4 groups."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    weight = weight.masked_fill(SemiStructured(2, 4).mask(weight.abs().float(), 0.5), 0.0)
    shapes = [(*tokens, width), None, (out,), (rank, width), (out, rank)]
    drawn = [weight if s is None else torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return [tensor.to(dtype) for tensor in drawn]


def by_autograd(x, weight, bias, a, b, scale, dropped=None):
    update = (weight != 0) * (b @ a) * scale
    if dropped is None:
        return nn.functional.linear(x, weight + update, bias)
    return nn.functional.linear(x, weight, bias) + nn.functional.linear(dropped, update)


def gradients(function, inputs, weight, bias, a, b, dropped=None, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs, bias, a, b)]
    dropped = None if dropped is None else leaves[0] * dropped
    output = function(leaves[0], weight, leaves[1], leaves[2], leaves[3], 0.7, dropped, **options)
    output.square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("with_dropout", [False, True])
def test_gradcheck(with_dropout):
    x, weight, bias, a, b = problem()
    leaves = [tensor.requires_grad_() for tensor in (x, bias, a, b)]
    dropped = torch.randn_like(x).requires_grad_() if with_dropout else None

    def function(x, bias, a, b, dropped):
        return masked_lora_linear(x, weight, bias, a, b, 0.7, dropped)

    assert torch.autograd.gradcheck(function, (*leaves, dropped))


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)]
)
def test_equal_to_plain_autograd(dtype, tolerance, with_dropout):
    """In bfloat16 the reference is float32 on the same rounded numbers: only rounding may differ."""
    x, weight, bias, a, b = problem(dtype)
    dropped = (torch.arange(x.numel()).reshape(x.shape) % 3 > 0).to(dtype) * 1.5 if with_dropout else None
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    wide = [tensor.to(exact) for tensor in (x, weight, bias, a, b)]
    expected = gradients(by_autograd, *wide, None if dropped is None else dropped.to(exact))
    for ours, reference in zip(gradients(masked_lora_linear, x, weight, bias, a, b, dropped), expected):
        assert (ours.to(exact) - reference).abs().max() <= tolerance * reference.abs().max()


def test_straight_through_leaves_the_mask_out_of_the_adapters_gradients_only():
    x, weight, bias, a, b = problem()
    ours = gradients(masked_lora_linear, x, weight, bias, a, b, gradient="straight_through")
    exact = gradients(by_autograd, x, weight, bias, a, b)
    torch.testing.assert_close(ours[:3], exact[:3])
    rows, columns = 2 * exact[0].flatten(0, 1), x.flatten(0, 1)
    torch.testing.assert_close(ours[4], 0.7 * rows.T @ columns @ a.T)
    torch.testing.assert_close(ours[3], 0.7 * b.T @ rows.T @ columns)


def test_equal_under_gradient_checkpointing():
    x, weight, bias, a, b = problem()

    def recomputed(*arguments):
        return checkpoint(masked_lora_linear, *arguments, use_reentrant=False)

    torch.testing.assert_close(
        gradients(recomputed, x, weight, bias, a, b), gradients(by_autograd, x, weight, bias, a, b)
    )


def test_nothing_is_kept_for_backward_but_what_lives_elsewhere():
    x, weight, bias, a, b = problem(torch.float32, out=64, width=96, rank=4)
    alive = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, bias, a, b)}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in alive:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    leaves = [tensor.requires_grad_() for tensor in (a, b)]
    x.requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        masked_lora_linear(x, weight, bias, *leaves, 0.5)
        assert sum(kept) == 0
        by_autograd(x, weight, bias, *leaves, 0.5)
    assert sum(kept) >= weight.numel() * weight.element_size()


def test_compiled_function_gives_the_same():
    x, weight, bias, a, b = problem(torch.float32)
    compiled = torch.compile(masked_lora_linear, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(
        gradients(compiled, x, weight, bias, a, b), gradients(masked_lora_linear, x, weight, bias, a, b)
    ):
        torch.testing.assert_close(ours, expected)


class Base(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        generator = torch.Generator().manual_seed(1)
        for linear in (self.up, self.down):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
            mask = SemiStructured(2, 4).mask(linear.weight.abs(), 0.5)
            # A pruned weight may be -0.0, where a tool multiplied with a mask.
            linear.weight.data = linear.weight.data * ~mask
        self.to(dtype)

    def forward(self, x):
        return self.down(self.up(x).relu())


def adapted(dtype, **options) -> Any:
    torch.manual_seed(0)
    config = sparse_lora_config(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False, **options)
    return get_peft_model(Base(dtype), config)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_positive_zero_after_merging_and_what_is_trained_is_what_is_merged(dtype, safe):
    tuned, base = adapted(dtype).eval(), Base(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    before = tuned(x)
    up = tuned.base_model.model.up
    effective = masked_weight(
        up.base_layer.weight, up.lora_A["default"].weight, up.lora_B["default"].weight, up.scaling["default"]
    )
    merged = tuned.merge_and_unload(safe_merge=safe)
    if not (safe and dtype == torch.bfloat16):  # there PEFT rounds twice
        assert torch.equal(merged.up.weight, effective)
        torch.testing.assert_close(merged(x), before)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    for name in ("up", "down"):
        weight, dense = getattr(merged, name).weight, getattr(base, name).weight
        assert torch.equal((weight.view(bits) == 0), dense == 0)
        assert not torch.equal(weight, dense)


def test_merging_and_unmerging_in_place_keeps_the_zeros():
    tuned = adapted(torch.float32)
    up = tuned.base_model.model.up
    original = up.base_layer.weight.clone()
    tuned.merge_adapter()
    assert torch.equal(up.base_layer.weight == 0, original == 0)
    tuned.unmerge_adapter()
    torch.testing.assert_close(up.base_layer.weight, original)
    assert torch.equal(up.base_layer.weight == 0, original == 0)


def test_dropout_acts_in_training_only_and_on_the_update_only():
    tuned = adapted(torch.float32, lora_dropout=0.5)
    x = torch.ones(1, 16)
    assert not torch.equal(tuned.train()(x), tuned(x))
    assert torch.equal(tuned.eval()(x), tuned(x))
    layer = tuned.train().base_model.model.up
    nn.init.zeros_(layer.lora_B["default"].weight)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_bfloat16_autocast_computes_in_bfloat16_and_trains_float32_adapters():
    tuned = adapted(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = tuned(torch.randn(3, 16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert tuned.base_model.model.up.lora_A["default"].weight.grad.dtype == torch.float32


def test_variants_of_lora_that_have_no_mask_are_refused():
    with pytest.raises(ValueError, match="variant"):
        adapted(torch.float32, use_dora=True)
