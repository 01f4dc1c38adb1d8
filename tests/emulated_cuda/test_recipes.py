"""Every recipe gives the same bytes on a GPU as on the CPU, wherever its samples wait, and without a race."""

from __future__ import annotations

import pytest

from tests.emulated_cuda import runs
from tests.emulated_cuda.runs import REPOSITORY

pytestmark = pytest.mark.emulated_gpu

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs" / "prune").glob("*.yaml"))
PLACES = ("device", "host", "disk")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_are_those_of_the_cpu(recipe, on_device, tmp_path):
    options = {"samples": 3}  # while one is computed the next one arrives and the last one leaves
    expected = on_device(runs.prune, recipe, "cpu", "device", tmp_path / "out", **options)
    assert expected.tensors
    for place in PLACES:
        found = on_device(runs.prune, recipe, "cuda", place, tmp_path / "out", **options)
        different = [name for name in expected.tensors if found.tensors.get(name) != expected.tensors[name]]
        assert not different, place
        assert found.tensors.keys() == expected.tensors.keys()
        assert not found.races, place


def test_a_run_on_the_cpu_does_not_touch_the_gpu(on_device, tmp_path):
    """It would wait for other people's work there, and fail where the GPU is full."""
    outcome = on_device(runs.prune, "wanda", "cpu", "device", tmp_path / "out")
    assert outcome.tensors
    assert not outcome.waits
    assert not outcome.launches
    assert outcome.allocations == 0
