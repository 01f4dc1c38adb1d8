"""Kernels that err on a machine are not used there."""

import pytest
import torch

from lvlm_prune.packed.kernels import PackedMatrix, cpu, native, packed_linear
from lvlm_prune.packed.kernels.native import Level

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels are not built")


@pytest.fixture
def unchecked():
    native._best.cache_clear()
    yield
    native._best.cache_clear()


def test_the_kernels_of_this_machine_agree_with_torch(unchecked):
    assert native._best() == Level(native.library().lvlm_best_level())


@pytest.mark.parametrize("wrong", [lambda y: y * 1.5, lambda y: torch.full_like(y, float("nan")), torch.zeros_like])
def test_kernels_that_err_are_left_out(wrong, unchecked, monkeypatch):
    right = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *arguments: wrong(right(*arguments)))
    assert native._best() == Level.TORCH
    weight = torch.eye(16)
    x = torch.randn(2, 16)
    assert torch.equal(packed_linear(x, PackedMatrix.from_dense(weight)), x)
