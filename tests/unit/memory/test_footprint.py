import pytest
import torch

from lvlm_prune.blocks import prunable_linears
from lvlm_prune.memory.footprint import Footprint
from lvlm_prune.memory.sizes import BatchSize, MemoryDemand
from lvlm_prune.methods.allocation import ECoFLaPAllocation, KLAllocation
from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.methods.solvers import ALPSSolver, Solver
from lvlm_prune.methods.survey import Surveyor
from lvlm_prune.module import LVLMModule
from tests.families import tiny_model

GIGABYTE = 10**9


@pytest.fixture
def footprint(tmp_path):
    tiny_model("qwen2_vl").save_pretrained(tmp_path)
    module = LVLMModule(str(tmp_path))
    module.open()
    batch = BatchSize.of({"input_ids": torch.ones(1, 50, dtype=torch.int64)}, module.model.config, ["image"])

    def predict(device: str, solver: Solver | None = None, surveyors: tuple[Surveyor, ...] = ()) -> Footprint:
        solver = solver or WandaScorer().solver()
        method = MemoryDemand(MixedPool(), solver, frozenset(), True, surveyors, frozenset(), True)
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


def test_a_survey_that_tries_changed_weights_takes_statistics_and_what_is_tried_or_the_head(footprint):
    solver, allocation = ALPSSolver(), KLAllocation(groups="block")
    allocation.use_method(solver, Unstructured(), 0.5)
    plain, surveyed = footprint("cpu", solver), footprint("cpu", solver, (allocation,))
    noise = footprint("cpu", solver, (ECoFLaPAllocation(),))
    linears = [
        linear.weight.shape for linear in prunable_linears(tiny_model("qwen2_vl").get_decoder().layers[0]).values()
    ]
    sites = {columns for _, columns in linears}
    statistics = sum(12 * columns**2 for columns in sites)  # products in float64, and SparseGPT's factor
    tried = sum(rows * columns for rows, columns in linears) * plain.itemsize
    assert surveyed.head_bytes > 0
    block = max(plain.block_bytes)
    assert surveyed.phases()["survey"] > block + statistics + max(tried, 2 * block, surveyed.head_bytes)
    assert noise.phases()["survey"] > max(plain.phases()["survey"], 3 * block, block + noise.head_bytes)
    assert {name: count for name, count in surveyed.phases().items() if name != "survey"} == {
        name: count for name, count in plain.phases().items() if name != "survey"
    }
