"""Sparse LoRA under what trains and compiles models: the gradients are those of one process, uncompiled."""

import shutil
import sys

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lvlm_prune.recovery import sparse_lora_config
from tests import warm
from tests.conftest import REPOSITORY


def adapted() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    for linear in (base[0], base[2]):
        linear.weight.data[torch.rand_like(linear.weight) < 0.5] = 0.0
    config = sparse_lora_config(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(base, config)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().mean().backward()
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def batch() -> torch.Tensor:
    return torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(1))


def one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = gradients(DistributedDataParallel(adapted()), batch()[rank::2])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    both = [warm.start(rank, tmp_path, module=__name__, cwd=REPOSITORY) for rank in range(2)]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    expected = gradients(adapted(), batch())
    assert len(expected) == 4
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")],
        ),
    ],
)
def test_a_compiled_model_has_the_same_gradients(backend, monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "0")  # inductor sets it, and leaves it behind
    torch.testing.assert_close(
        gradients(torch.compile(adapted(), backend=backend), batch()), gradients(adapted(), batch())
    )


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), sys.argv[2])
