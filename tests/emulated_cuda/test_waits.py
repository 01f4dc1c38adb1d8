"""How often the host waits for the device: not for each token, Linear or sample, or a GPU would stand still."""

from __future__ import annotations

import pytest

from tests.emulated_cuda import runs

pytestmark = pytest.mark.emulated_gpu

BLOCKS, LINEARS = 4, 7
FEW, MANY = 2, 6

# What happens once per sample, when it is caught: its tokens are looked at on the host.
ONCE = ("blocks/capture.py", "blocks/modality.py", "loop/catching.py", "rows_of", "indices", "memory/", "groups_of")

# Waits per sample and block.
LIMITS = {"wanda": 0, "atv": 0, "ria": 0, "sparsegpt": 0, "atv_sparsegpt": 0, "mllm_pruner": 1, "amia": 7, "tamp": 7}


@pytest.fixture(scope="module")
def waits(process, tmp_path_factory):
    """Recipe -> waits per line of code, with few samples and with many."""
    made: dict[str, list[dict[str, int]]] = {}

    def of(recipe: str) -> list[dict[str, int]]:
        if recipe not in made:
            output = tmp_path_factory.mktemp("waits") / "out"
            outcomes = [process(runs.prune, recipe, "cuda", "device", output, samples=count) for count in (FEW, MANY)]
            made[recipe] = [dict(outcome.waits) for outcome in outcomes]
        return made[recipe]

    return of


@pytest.mark.parametrize("recipe", LIMITS)
def test_waits_per_sample_and_block(recipe, waits):
    few, many = waits(recipe)
    more = {line: count - few.get(line, 0) for line, count in many.items() if count != few.get(line, 0)}
    in_blocks = {line: count for line, count in more.items() if not any(part in line for part in ONCE)}
    per_sample_and_block = sum(in_blocks.values()) / (MANY - FEW) / BLOCKS
    assert per_sample_and_block <= LIMITS[recipe], in_blocks


@pytest.mark.parametrize("recipe", ["wanda", "atv"])
def test_what_all_linears_of_a_block_have_to_say_is_asked_for_at_once(recipe, waits):
    """Reading and writing weights aside, which is per tensor."""
    few, many = waits(recipe)
    per_linear = {
        line: few[line]
        for line in few
        if few[line] == many.get(line) and few[line] >= BLOCKS * LINEARS and "checkpoints/" not in line
    }
    assert not {line for line in per_linear if "blocks/weights.py" not in line}
