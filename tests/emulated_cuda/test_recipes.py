"""Every recipe gives the same bytes on a GPU as on the CPU, wherever its samples wait, and without a race."""

from __future__ import annotations

import pytest

from tests.emulated_cuda import runs
from tests.emulated_cuda.runs import REPOSITORY, Outcome

pytestmark = pytest.mark.emulated_gpu

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs" / "prune").glob("*.yaml"))
PLACES = ("device", "host", "disk")


@pytest.fixture(scope="module")
def on_cpu(process, tmp_path_factory):
    """What a recipe writes on the CPU, made once."""
    made: dict[str, Outcome] = {}

    def of(recipe: str) -> Outcome:
        if recipe not in made:
            output = tmp_path_factory.mktemp("cpu") / "out"
            made[recipe] = process.submit(runs.prune, recipe, "cpu", "device", output).result()
        return made[recipe]

    return of


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_are_those_of_the_cpu(recipe, place, on_device, on_cpu, tmp_path):
    found = on_device(runs.prune, recipe, "cuda", place, tmp_path / "out")
    assert found.tensors
    assert found.tensors == on_cpu(recipe).tensors
    assert not found.races


def test_a_run_on_the_cpu_does_not_touch_the_gpu(on_cpu):
    """It would wait for other people's work there, and fail where the GPU is full."""
    outcome = on_cpu("wanda")
    assert not outcome.waits
    assert not outcome.launches
    assert outcome.allocations == 0
