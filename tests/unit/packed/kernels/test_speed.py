"""Packed in memory only where that is not slower."""

import time

import pytest
import torch

from lvlm_prune.packed.kernels import PackedMatrix, is_faster_packed, speed
from lvlm_prune.packed.kernels.native import Level, level, limited_to

pytestmark = pytest.mark.skipif(level() == Level.TORCH, reason="the C++ kernels are not built")


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "_measured", {})


def matrix(columns: int = 64) -> PackedMatrix:
    return PackedMatrix.from_dense(torch.arange(16 * columns).view(16, columns) % 2.0)


def delay(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Make one of the two products much slower; the list grows with each."""
    product, calls = getattr(speed, name), []

    def slow(*arguments):
        calls.append(1)
        time.sleep(1e-3)
        return product(*arguments)

    monkeypatch.setattr(speed, name, slow)
    return calls


@pytest.mark.parametrize(("slow", "packed"), [("packed_linear", False), ("linear", True)])
def test_the_faster_product_is_taken(monkeypatch, slow: str, packed: bool) -> None:
    delay(monkeypatch, slow)
    assert is_faster_packed(matrix()) is packed


def test_a_shape_is_measured_once(monkeypatch) -> None:
    calls = delay(monkeypatch, "linear")
    is_faster_packed(matrix())
    first = len(calls)
    is_faster_packed(matrix())
    assert len(calls) == first > 0
    is_faster_packed(matrix(columns=128))
    assert len(calls) > first


def test_what_is_unpacked_for_every_product_is_never_faster() -> None:
    with limited_to("torch"):
        plain = matrix()
    assert not is_faster_packed(plain)


def test_whoever_names_the_instruction_set_gets_packed_products(monkeypatch) -> None:
    delay(monkeypatch, "packed_linear")
    with limited_to("plain"):
        assert is_faster_packed(matrix())
    monkeypatch.setenv("LVLM_PRUNE_KERNELS", "avx512")
    assert is_faster_packed(matrix())


def test_a_matrix_in_tiles_can_be_multiplied_when_torch_is_asked_for() -> None:
    tiled, x = matrix(), torch.randn(3, 64)
    with limited_to("torch"):
        y = speed.packed_linear(x, tiled)
    torch.testing.assert_close(y, x @ tiled.to_dense().T)
