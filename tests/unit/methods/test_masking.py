import pytest
import torch

from lvlm_prune.methods.masking import zero_, zeroed

SPECIAL = [0.0, -0.0, 1.5, -1.5, float("inf"), float("-inf"), float("nan"), 1e-40]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gives_the_bits_of_masked_fill(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(130, 2100, generator=generator)  # more rows than are turned to zeros at once
    values[:, : len(SPECIAL)] = torch.tensor(SPECIAL)
    values, mask = values.to(dtype), torch.rand(130, 2100, generator=generator) < 0.5
    before, expected = values.clone(), values.clone().masked_fill_(mask, 0.0)

    found = zeroed(values, mask)

    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(values.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 7)])
def test_works_on_columns_of_a_matrix_and_on_its_transpose(shape):
    whole, mask = torch.full((shape[0], shape[1] + 2), -1.0), torch.rand(shape) < 0.5
    assert zero_(whole[:, 1:-1], mask) is not whole
    assert torch.equal(whole[:, 1:-1], torch.full(shape, -1.0).masked_fill(mask, 0.0))
    assert (whole[:, [0, -1]] == -1).all()

    turned = torch.full(shape, -1.0)
    zero_(turned.T, mask.T)
    assert torch.equal(turned, torch.full(shape, -1.0).masked_fill(mask, 0.0))


def test_a_parameter_that_wants_a_gradient_is_zeroed_in_place():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    zero_(weight.data, torch.tensor([[True, False, False]] * 2))
    assert weight.tolist() == [[0.0, 1.0, 1.0]] * 2
    assert not zeroed(weight, torch.zeros(2, 3, dtype=torch.bool)).requires_grad
