import pytest
import torch

from lvlm_prune.memory.footprint import Footprint
from lvlm_prune.memory.sizes import BatchSize, MemoryDemand
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.module import LVLMModule
from tests.families import tiny_model

GIGABYTE = 10**9


@pytest.fixture
def footprint(tmp_path):
    tiny_model("qwen2_vl").save_pretrained(tmp_path)
    module = LVLMModule(str(tmp_path))
    module.open()
    method = MemoryDemand(MixedPool(), WandaScorer().solver(), frozenset(), True, frozenset(), True)
    batch = BatchSize.of({"input_ids": torch.ones(1, 50, dtype=torch.int64)}, module.model.config, ["image"])

    def predict(device: str) -> Footprint:
        return Footprint(module, module.parts[0], method, [batch] * 3, torch.device(device), GIGABYTE, 0)

    return predict


def test_on_a_gpu_the_next_block_is_on_the_device_beside_the_present_one(footprint):
    on_cpu, on_gpu = footprint("cpu"), footprint("cuda")
    block = max(on_cpu.block_bytes)
    for phase, count in on_cpu.phases().items():
        # A GPU is kept busy with more scores at once than a CPU's caches hold.
        assert on_gpu.phases()[phase] == count or (phase == "scoring" and on_gpu.phases()[phase] > count), phase
    assert on_cpu.peak("device").device is None
    device, host = on_gpu.peak("device").device, on_gpu.peak("device").host
    assert max(on_gpu.phases().values()) < device < GIGABYTE  # libraries are in host memory
    assert GIGABYTE + block < host < on_cpu.peak("device").host + block


def test_samples_take_memory_where_they_wait(footprint):
    on_gpu = footprint("cuda")
    peaks = {place: on_gpu.peak(place) for place in ("device", "host", "disk")}
    held = on_gpu.waiting_bytes()
    assert peaks["device"].device - peaks["disk"].device == held
    assert peaks["host"].device == peaks["disk"].device
    assert held <= peaks["host"].host - peaks["disk"].host <= 2 * held  # pinned memory comes in powers of two
    assert peaks["disk"].disk == held
