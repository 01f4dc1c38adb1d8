"""The table of families: what is said to be exact is so, and what is wrong is seen."""

import copy
import json

import pytest
import transformers

from benchmarks.families.coverage import RESULTS, TABLE, run
from benchmarks.families.tiny_config import names
from benchmarks.families.verdicts import EXACT, table, verdict

# One for each thing that a decoder may do beyond calling its blocks in a row.
KINDS = [
    "ernie4_5_vl_moe",  # two stacks of experts, by modality
    "gemma3n",  # four residual streams, keys and values of earlier blocks
    "gemma4:moe",  # experts beside a dense network
    "git",  # the image in front of the text
    "glm5_next",  # second outputs from block to block
    "idefics",  # cross-attention modules between blocks
    "inkling2",  # a block mixes the outputs of all earlier ones
    "inkling_mm_model",  # configuration values that are tensors
    "kosmos-2",  # the image in the place of any tokens
    "llama4:mix",  # every expert has its own copy of all tokens
    "minimax_m3_vl:sparse",
    "mistral_large4",
    "mllama",  # blocks that text skips
    "nemotron_h_omni",  # state-space blocks
    "qwen3_5_moe",  # linear attention
    "qwen3_vl",  # features that are added between blocks
    "qwen4_exp",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_family_is_exact(name: str) -> None:
    assert verdict(name, run(name, seconds=300)) == EXACT


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads(RESULTS.read_text())


def test_the_table_is_that_of_the_results(found: dict) -> None:
    assert TABLE.read_text() == table(found["results"], found["transformers"])


def test_the_results_hold_every_name(found: dict) -> None:
    if found["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {found['transformers']}")
    assert set(found["results"]) == set(names())


def _set(path: str, value: object):
    """Changes one entry of a result."""

    def change(result: dict) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            result = result[parent]
        result[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("float32.single", "output: differs by 0.1"), "single: output: differs by 0.1"),
        (_set("bfloat16.text", "block 1: differs"), "bfloat16, text: block 1: differs"),
        (_set("pruned", "output: differs by 0.1"), "blocks pruned on the way: output: differs by 0.1"),
        (_set("folder", "RuntimeError: status 2"), "folder: RuntimeError: status 2"),
        (_set("folder.different", 100), "folder: 100 of"),
        (_set("folder.same_linears", False), "folder: other Linears"),
        (_set("folder.reloads", False), "folder: keys are lost"),
        (_set("experts.different", 10**4), "experts: 10000 of"),
        (_set("visual_tokens", 0), "visual tokens: none are found"),
    ],
)
def test_whatever_is_wrong_is_in_the_verdict(found: dict, change, problem: str) -> None:
    result = copy.deepcopy(found["results"]["qwen3_vl_moe"])
    assert verdict("qwen3_vl_moe", result) == EXACT
    change(result)
    assert verdict("qwen3_vl_moe", result).startswith(problem)
