"""The product with a packed matrix is the product with the dense one, wherever torch asks for it."""

import pytest
import torch
from torch.nn import functional

from lvlm_prune.packed.kernels import PackedMatrix, packed_linear
from tests.unit.packed.kernels.matrices import DTYPES, SHAPES, same_bits, sparse


def activations(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_exact_as(result: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None):
    """Within the rounding of the result's dtype of a product in float64; torch may round before it adds the bias."""
    product = functional.linear(x.double(), dense.double())
    exact = product if bias is None else product + bias.double()
    scale = functional.linear(x.double().abs(), dense.double().abs())
    assert result.shape == exact.shape
    rounding = torch.finfo(result.dtype).eps / 2 * (exact.abs() + (0 if bias is None else product.abs()))
    assert ((result.double() - exact).abs() <= 1.001 * rounding + 1e-6 * scale + torch.finfo(result.dtype).tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_number_of_tokens(kernels, dtype, shape):
    dense = sparse(*shape, 0.5, dtype)
    matrix = PackedMatrix.from_dense(dense)
    bias = activations(shape[0], dtype=dtype, seed=2)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20, 63, 70):
        x = activations(tokens, shape[1], dtype=dtype)
        assert_as_exact_as(packed_linear(x, matrix), x, dense)
        assert_as_exact_as(packed_linear(x, matrix, bias), x, dense, bias)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_each_pair_of_dtypes(kernels, x_dtype, weight_dtype):
    dense = sparse(40, 130, 0.6, weight_dtype)
    for tokens in (1, 4, 40):
        x = activations(tokens, 130, dtype=x_dtype)
        result = packed_linear(x, PackedMatrix.from_dense(dense))
        assert result.dtype == x_dtype
        assert_as_exact_as(result, x, dense)


def test_leading_dimensions_stay(kernels):
    dense = sparse(12, 20, 0.5, torch.float32)
    matrix = PackedMatrix.from_dense(dense)
    for shape in [(20,), (2, 20), (2, 3, 20), (0, 20), (2, 0, 20)]:
        x = activations(*shape, dtype=torch.float32)
        torch.testing.assert_close(packed_linear(x, matrix), functional.linear(x, dense))
    strided = activations(20, 6, dtype=torch.float32).T
    torch.testing.assert_close(packed_linear(strided, matrix), functional.linear(strided, dense))


def test_the_operator_keeps_the_rules_of_torch(kernels, monkeypatch, tmp_path):
    # torch sets this variable when its compiler is imported.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    matrix = PackedMatrix.from_dense(sparse(16, 64, 0.5, torch.float32))
    x = activations(2, 64, dtype=torch.float32).requires_grad_()
    bias = activations(16, dtype=torch.float32).requires_grad_()
    operator = torch.ops.lvlm_prune.packed_linear.default
    torch.library.opcheck(operator, matrix.operands(x, bias), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(operator, matrix.operands(x, bias), test_utils=("test_autograd_registration",))


@pytest.mark.parametrize("tokens", [1, 30])
def test_the_gradient_is_the_dense_one(kernels, tokens):
    dense = sparse(24, 70, 0.5, torch.float32)
    matrix = PackedMatrix.from_dense(dense)
    gradients = []
    for product in (lambda x, bias: packed_linear(x, matrix, bias), lambda x, bias: functional.linear(x, dense, bias)):
        x = activations(tokens, 70, dtype=torch.float32).requires_grad_()
        bias = activations(24, dtype=torch.float32).requires_grad_()
        product(x, bias).square().sum().backward()
        gradients.append((x.grad, bias.grad))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)  # sums of another order


def test_a_compiled_model_has_the_operator_in_one_graph(kernels, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    matrix = PackedMatrix.from_dense(sparse(24, 70, 0.5, torch.float32))
    x = activations(3, 70, dtype=torch.float32)
    compiled = torch.compile(lambda x: packed_linear(x.relu(), matrix) + 1, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), packed_linear(x.relu(), matrix) + 1)


def test_whoever_watches_operators_sees_this_one(kernels):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    matrix = PackedMatrix.from_dense(sparse(24, 70, 0.5, torch.float32))
    x = activations(3, 70, dtype=torch.float32)
    with Watch():
        watched = packed_linear(x, matrix)
    assert torch.ops.lvlm_prune.packed_linear.default in seen
    assert same_bits(watched, packed_linear(x, matrix))


def test_what_does_not_fit_is_refused():
    matrix = PackedMatrix.from_dense(sparse(24, 70, 0.5, torch.float32))
    with pytest.raises(ValueError, match="70 columns"):
        packed_linear(torch.zeros(2, 71), matrix)
    with pytest.raises(ValueError, match="meta"):
        packed_linear(torch.zeros(2, 70, device="meta"), matrix)


def test_zeros_far_from_everything_and_large_matrices(kernels):
    """Several threads, several pieces, groups without any value."""
    dense = sparse(520, 1030, 0.7, torch.bfloat16)
    dense[8:24] = 0
    dense[100, :] = 1
    matrix = PackedMatrix.from_dense(dense)
    torch.set_num_threads(2)
    try:
        for tokens in (1, 4, 600):
            x = activations(tokens, 1030, dtype=torch.bfloat16)
            assert_as_exact_as(packed_linear(x, matrix), x, dense)
            assert same_bits(matrix.to_dense(), dense)
    finally:
        torch.set_num_threads(1)


def test_one_token_has_the_same_result_with_any_number_of_threads(kernels):
    matrix = PackedMatrix.from_dense(sparse(520, 1030, 0.7, torch.bfloat16))
    x = activations(1, 1030, dtype=torch.bfloat16)
    one = packed_linear(x, matrix)
    torch.set_num_threads(2)
    try:
        assert same_bits(packed_linear(x, matrix), one)
    finally:
        torch.set_num_threads(1)
