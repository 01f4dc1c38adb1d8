"""What stays dense in a packed model is multiplied by torch, or faster and as exactly."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lvlm_prune.packed import dense
from lvlm_prune.packed.dense import DenseLinear, use_dense_kernels, use_torch
from lvlm_prune.packed.kernels import cpu, is_faster_than_torch
from lvlm_prune.packed.kernels.native import Level, level, limited_to

HAS_KERNEL = pytest.mark.skipif(level() < Level.AVX2, reason="no dense kernel for this instruction set")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(rows=96, columns=128, dtype=torch.bfloat16, kind=DenseLinear):
    torch.manual_seed(0)
    module = nn.Linear(columns, rows, bias=False, dtype=dtype)
    module.__class__ = kind
    return module


@HAS_KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(1,), (1, 1), ()], ids=str)
@torch.inference_mode()
def test_one_token_is_within_rounding_of_a_precise_product(dtype, leading, monkeypatch):
    calls, really = [], cpu.dense_linear
    monkeypatch.setattr(cpu, "dense_linear", lambda *arguments: calls.append(1) or really(*arguments))
    module = make(dtype=dtype)
    x = torch.randn(*leading, 128).to(dtype)
    found, precise = module(x), linear(x.double(), module.weight.double())
    assert calls
    assert (found.shape, found.dtype) == (precise.shape, dtype)
    torch.testing.assert_close(found.double(), precise, rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(96, 128, 2), (96, 120, 1), (94, 128, 1)], ids=["two tokens", "columns", "rows"]
)
@torch.inference_mode()
def test_all_else_is_what_torch_gives(rows, columns, tokens):
    module = make(rows, columns)
    x = torch.randn(tokens, columns).bfloat16()
    assert torch.equal(module(x), linear(x, module.weight))


def test_gradients_flow_and_torch_alone_is_bit_identical():
    module, x = make(dtype=torch.float32), torch.randn(1, 128, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad[0], module.weight.detach().sum(0))
    assert module.weight.grad is not None
    with limited_to("torch"), torch.inference_mode():
        assert torch.equal(module(x), linear(x, module.weight))
        model = nn.ModuleList([make(kind=nn.Linear)])
        use_dense_kernels(model)
        assert type(model[0]) is nn.Linear


@HAS_KERNEL
def test_large_linears_use_the_kernel_where_it_is_faster_and_can_be_made_ordinary_again(monkeypatch):
    """Not small ones, those with a bias, or those for which there is no kernel."""
    monkeypatch.setattr(dense, "SMALLEST", 96 * 128)
    monkeypatch.setattr(dense, "is_faster_than_torch", lambda weight: len(weight) != 100)
    large, slower = make(kind=nn.Linear), make(100, kind=nn.Linear)
    model = nn.ModuleList([large, slower, make(64, kind=nn.Linear), nn.Linear(128, 96), nn.Embedding(96, 128)])
    model[4].weight = large.weight
    use_dense_kernels(model)
    assert [type(module) for module in model] == [DenseLinear, nn.Linear, nn.Linear, nn.Linear, nn.Embedding]
    assert model[4].weight is large.weight
    use_torch(model)
    assert [type(module) for module in model][:2] == [nn.Linear, nn.Linear]


@HAS_KERNEL
def test_which_is_faster_is_measured_on_a_part_of_the_rows(monkeypatch):
    seen = []
    monkeypatch.setattr("lvlm_prune.packed.kernels.speed.ENOUGH", 64 * 128)
    monkeypatch.setattr("lvlm_prune.packed.kernels.speed._measured", {})

    def times(own, faster):
        monkeypatch.setattr("lvlm_prune.packed.kernels.speed._measured", {})
        monkeypatch.setattr("lvlm_prune.packed.kernels.speed.fastest_times", lambda products: seen.append(1) or own)
        assert is_faster_than_torch(make(4000).weight) is faster
        assert is_faster_than_torch(make(5000).weight) is faster  # the same part: not measured again

    times((1.0, 2.0), True)
    times((2.0, 1.0), False)
    times((1.0, 1.0), False)
    assert len(seen) == 3
    assert not is_faster_than_torch(make(4002).weight)
