"""A number of the command line is legal, or refused in one line that names it; whatever is typed in its place."""

import inspect
import math
from typing import Any, get_type_hints

import pytest

from lvlm_prune.callbacks import BlockwisePruning, ModalityProbe, SparseLoRA
from lvlm_prune.cli_parser import LVLMParser
from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.errors import LVLMPruneError
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.scores import Benchmark
from lvlm_prune.methods.allocation.base import Allocation
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.solvers.base import Solver
from lvlm_prune.recovery.distillation import Distillation
from lvlm_prune.recovery.optimization import Optimization
from lvlm_prune.recovery.reconstruction import Reconstruction
from lvlm_prune.runs.reproduce.harness import Harness
from tests.options import VALUES, Option, numbers_of, plugins

SECTIONS = (BlockwisePruning, ModalityProbe, SparseLoRA, CalibrationDataModule, RecoveryDataModule)
SECTIONS += (Optimization, Distillation, Reconstruction, Harness)
BASES = (CalibrationSource, Engine, Benchmark, Pool, Saliency, Scorer, Allocation, Solver)
OWNERS = [*SECTIONS, *(plugin for base in BASES for plugin in plugins(base))]
OPTIONS = [option for owner in OWNERS for option in numbers_of(owner)]
_EMPTY = inspect.Parameter.empty
# What a class needs besides.
REQUIRED: dict[str, Any] = {"path": "data.json", "sources": [None, None], "source": None, "tasks": [], "ratios": [1, 1]}


def read(option: Option, value: str) -> Any:
    """What the command line makes of a value."""
    parser = LVLMParser()
    parser.add_argument(f"--{option.name}", type=get_type_hints(option.owner.__init__)[option.name])
    return parser.parse_args([f"--{option.name}={option.given(value)}"])[option.name]


def made(option: Option, value: Any) -> str:
    """What the class says against a value; an empty text where it takes it."""
    arguments = inspect.signature(option.owner).parameters
    needed = {name: part for name, part in REQUIRED.items() if name in arguments and arguments[name].default is _EMPTY}
    try:
        option.owner(**(needed | {option.name: value}))
    except (LVLMPruneError, ValueError) as error:  # of a plugin, to which whoever holds it adds the place
        return str(error)
    return ""


def fault(option: Option, text: str) -> str:
    """What is wrong with how a value is taken; an empty text where nothing is."""
    default = inspect.signature(option.owner).parameters[option.name].default
    try:
        value = read(option, text)
    except LVLMPruneError as error:
        given = str(error).removeprefix(f"--{option.name} ").partition(": ")[0]
        shown = {"": ("''",), "1e308": ("1e308", "1e+308"), "null": ("null", "None")}.get(text, (text,))
        named = any(each in given for each in shown)
        return "" if named and "\n" not in str(error) else f"says {error}"
    if said := made(option, value):
        named = f".{option.name} " in said or said.startswith(f"`{option.name}")
        return "" if named and "\n" not in said else f"says {said}"
    taken = [each for each in (value if option.many else [value]) if isinstance(each, (int, float))]
    if not all(math.isfinite(number) and (number >= 0 or option.name == "seed") for number in taken):
        return "is taken"
    return f"is taken as {value}" if text in ("", "abc") and value not in (text, default) else ""


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_number_is_legal_or_refused_in_one_line(option):
    assert {text: said for text in VALUES if (said := fault(option, text))} == {}
