"""Many tokens are multiplied in the dtype that this machine is fastest in."""

import pytest
import torch

from lvlm_prune.packed.kernels import PackedMatrix, linear, packed_linear, products
from tests.unit.packed.kernels.matrices import sparse


@pytest.fixture
def timed(monkeypatch):
    """Says how long products take in 16 bits and in float32, and counts how often that is asked."""
    asked = []

    def set_times(*seconds: float) -> list:
        monkeypatch.setattr(products, "fastest_times", lambda contestants: asked.append(len(contestants)) or seconds)
        products._is_slower_than_float32.cache_clear()
        return asked

    yield set_times
    products._is_slower_than_float32.cache_clear()


@pytest.mark.parametrize(("seconds", "fastest"), [((2.0, 1.0), torch.float32), ((1.1, 1.0), torch.bfloat16)])
def test_float32_is_taken_where_it_is_faster_by_a_margin(timed, monkeypatch, seconds, fastest):
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    asked = timed(*seconds)
    assert products.fastest_dtype(torch.bfloat16) == fastest
    assert products.fastest_dtype(torch.bfloat16) == fastest
    assert asked == [2], "measured once in a process"
    assert products.fastest_dtype(torch.float32) == torch.float32


def test_nothing_is_timed_where_a_processor_has_no_products_in_16_bits(timed, monkeypatch):
    monkeypatch.setattr(products, "multiplies", lambda dtype: False)
    asked = timed(1.0, 2.0)
    assert products.fastest_dtype(torch.float16) == torch.float32
    assert asked == []


@pytest.mark.parametrize("chosen", [torch.float32, torch.bfloat16])
def test_rows_are_unpacked_to_the_dtype_that_was_chosen(kernels, monkeypatch, chosen):
    if kernels < 0:
        pytest.skip("plain torch unpacks whole matrices")
    seen = []
    unpack = linear.cpu.unpack
    monkeypatch.setattr(linear, "fastest_dtype", lambda dtype: chosen)
    monkeypatch.setattr(
        linear.cpu, "unpack", lambda *tiles, dtype, **more: seen.append(dtype) or unpack(*tiles, dtype=dtype, **more)
    )
    dense = sparse(300, 130, 0.5, torch.bfloat16)
    x = torch.randn(100, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = packed_linear(x, PackedMatrix.from_dense(dense)).double()
    assert set(seen) == {chosen}
    exact = x.double() @ dense.double().T
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-2).all()
