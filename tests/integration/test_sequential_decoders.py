"""Every decoder of transformers' image-text-to-text mapping, site by site and for the dense model's outputs."""

import json
from contextlib import suppress
from typing import Any

import pytest

from benchmarks.families.coverage import RESULTS, run
from benchmarks.families.tiny_config import mend_forward, names, tiny_model
from benchmarks.families.verdicts import EXACT, verdict
from benchmarks.families.visual_inputs import image_samples, text_samples
from lvlm_prune import prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.methods.solvers import DenseTargetSolver, SparseGPTSolver
from tests.full_forward import compute_experts_one_by_one, prune_by_full_forwards, solve_by_full_forwards, zeros

# Nothing comes before the queries; blocks hand keys and values on; neither.
QUICK = ("exaone4_5", "gemma4", "llava")


def held_against_whole_forwards(name: str) -> dict[str, Any]:
    """How many weights of a tiny model are pruned otherwise, and how far solved ones are from where they should be."""
    models = [compute_experts_one_by_one(tiny_model(name)) for _ in range(5)]
    for model in models:
        mend_forward(model)
    samples = []
    with suppress(ValueError):  # takes images in none of the usual forms
        samples += image_samples(models[0])
    with suppress(Exception):  # takes no text without an image
        models[0](**text_samples(1)[0], use_cache=False)
        samples += text_samples(2)
    expected = prune_by_full_forwards(models[0], samples, experts=True, sequential=True)
    method = BlockwisePruning(sparsity=0.5, pool=MixedPool(), sequential=True, min_expert_tokens=1)
    entries = prune(models[1], samples, method)["linears"]
    rare = {name for name, entry in entries.items() if entry.get("scored_by") == "magnitude"}
    found = {
        "pruned": sorted(set(expected) ^ ({name for name, entry in entries.items() if "note" not in entry} - rare)),
        "weights": sum(mask.numel() for mask in expected.values()),
        "different": sum(int((zeros(models[1], name) != mask).sum()) for name, mask in expected.items()),
    }
    solver = DenseTargetSolver(SparseGPTSolver(), damping=0.1)
    solved = solve_by_full_forwards(models[2], models[3], samples, solver, sequential=True)
    prune(models[4], samples, BlockwisePruning(sparsity=0.5, pool=MixedPool(), solver=solver, experts="keep"))
    found["distance"] = {
        name: float((models[4].get_submodule(name).weight - weight).norm() / weight.norm())
        for name, weight in solved.items()
    }
    return found


KNOWN = json.loads(RESULTS.read_text())["results"]
DECODERS = [name for name in names() if name in KNOWN and verdict(name, KNOWN[name]) == EXACT]


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in DECODERS]
)
def test_weights_are_those_of_whole_forwards(name: str) -> None:
    found = run(name, 600, held_against_whole_forwards)
    assert "reason" not in found, found
    assert not found["pruned"]
    assert found["different"] <= max(4, 1e-4 * found["weights"])
    far = {name: distance for name, distance in found["distance"].items() if distance > 0.05}
    assert len(far) <= 0.05 * len(found["distance"]), far
