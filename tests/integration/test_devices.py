"""Where a run computes, and what it says about that."""

from __future__ import annotations

import pytest
import torch

from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import InputError, ProcessLost
from lvlm_prune.trainer import LVLMTrainer


@pytest.fixture
def _on_a_mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("_on_a_mac")
@pytest.mark.parametrize("wanted", ["mps", "gpu"])
def test_an_apple_gpu_is_refused_before_any_work(wanted):
    with pytest.raises(InputError, match=f"--trainer.accelerator {wanted}: sums over tokens are in float64"):
        LVLMTrainer(accelerator=wanted)


@pytest.mark.usefixtures("_on_a_mac")
def test_a_mac_computes_on_its_cpu_by_default():
    assert Hardware.of(LVLMTrainer(logger=False)).accelerator == "cpu"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), torch.OutOfMemoryError),
        (RuntimeError("Input tensor data type is not supported for NCCL process group: Short"), RuntimeError),
        (RuntimeError("[/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), ProcessLost),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), ProcessLost),
    ],
)
def test_only_a_lost_connection_is_called_one(error, raised):
    """Out-of-memory in a message is to be read as that: another process has nothing to do with it."""
    processes = Processes()
    with pytest.raises((RuntimeError, ProcessLost)) as caught, processes._connection():
        raise error
    assert type(caught.value) is raised
