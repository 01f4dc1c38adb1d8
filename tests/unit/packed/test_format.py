"""A packed tensor: every bit comes back, and it is as small as promised."""

import pytest
import torch
from torch import Tensor

from lvlm_prune.packed import format
from lvlm_prune.packed.format import Format

SHAPES = [(3, 7), (64, 64), (5, 301), (1, 1000), (4, 33, 65)]
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def sparse(shape: tuple[int, ...], dtype: torch.dtype, sparsity: float = 0.6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    return weight.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0.0).to(dtype)


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern there is: denormal numbers, infinities, NaN with their payloads, both zeros."""
    integers = INTEGERS[dtype]
    limits = torch.iinfo(integers)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64)
    bits = bits.masked_fill(torch.rand(shape, generator=generator) < 0.7, 0)
    bits[..., 0] = limits.min  # -0.0
    return bits.to(integers).view(dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    integers = INTEGERS[first.dtype]
    return first.dtype == second.dtype and torch.equal(first.view(integers), second.view(integers))


@pytest.mark.parametrize("form", ["bitmask", "coded"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_come_back(shape: tuple[int, ...], dtype: torch.dtype, form: Format) -> None:
    weight = sparse(shape, dtype)
    parts = format.encode(weight, form)
    assert parts is not None
    assert same_bits(format.decode(parts), weight)
    assert sum(part.nbytes for part in parts.values()) < weight.nbytes


@pytest.mark.parametrize("form", ["bitmask", "coded"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_any_bits_come_back(seed: int, dtype: torch.dtype, form: Format) -> None:
    weight = any_bits((17, 203), dtype, seed)
    parts = format.encode(weight, form)
    assert parts is not None
    assert same_bits(format.decode(parts), weight)


@pytest.mark.parametrize(
    ("form", "sparsity", "smaller"),
    [
        ("bitmask", 0.5, 1.75),
        ("bitmask", 0.6, 2.1),
        ("bitmask", 0.7, 2.65),
        ("coded", 0.5, 2.2),
        ("coded", 0.6, 2.6),
        ("coded", 0.7, 3.2),
    ],
)
def test_matrices_are_as_small_as_promised(form: Format, sparsity: float, smaller: float) -> None:
    weight = sparse((512, 2048), torch.bfloat16, sparsity)
    parts = format.encode(weight, form)
    assert parts is not None
    assert weight.nbytes / sum(part.nbytes for part in parts.values()) > smaller


def test_an_outlier_does_not_spoil_its_row() -> None:
    weight = sparse((8, 4096), torch.bfloat16)
    spoiled = weight.clone()
    spoiled[:, 5] = float("inf")
    sizes = []
    for matrix in (weight, spoiled):
        parts = format.encode(matrix, "coded")
        assert parts is not None
        assert same_bits(format.decode(parts), matrix)
        sizes.append(sum(part.nbytes for part in parts.values()))
    assert sizes[1] < sizes[0] * 1.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_only_bfloat16_is_coded(dtype: torch.dtype) -> None:
    weight = sparse((16, 64), dtype)
    coded, bitmask = format.encode(weight, "coded"), format.encode(weight, "bitmask")
    assert coded is not None
    assert bitmask is not None
    assert coded.keys() == bitmask.keys() == {"", "_mask", "_shape"}


def test_exponents_without_a_window_are_not_coded() -> None:
    """Exponents all over the range would take more than the eight bits that they have."""
    weight = any_bits((64, 640), torch.bfloat16, seed=0)
    parts = format.encode(weight, "coded")
    assert parts is not None
    assert not format.is_coded(parts)


@pytest.mark.parametrize("sparsity", [0.0, 0.05])
def test_what_would_not_be_smaller_stays(sparsity: float) -> None:
    assert format.encode(sparse((64, 640), torch.bfloat16, sparsity), "bitmask") is None


def test_nothing_but_zeros() -> None:
    weight = torch.zeros(4, 9, dtype=torch.bfloat16)
    parts = format.encode(weight, "bitmask")
    assert parts is None or torch.equal(format.decode(parts), weight)
    large = torch.zeros(40, 90, dtype=torch.bfloat16)
    for form in ("bitmask", "coded"):
        parts = format.encode(large, form)
        assert parts is not None
        assert torch.equal(format.decode(parts), large)


@pytest.mark.parametrize("tensor", [torch.zeros(8), torch.zeros(2, 2, 2, 2), torch.zeros(8, 8, dtype=torch.int8)])
def test_other_tensors_are_not_packed(tensor: Tensor) -> None:
    assert format.encode(tensor, "bitmask") is None
