"""Plugins are found, and said by name with everything they were made with."""

import copy
import sys

import pytest

from lvlm_prune import load_pruning
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.methods import Allocation, Pool, Saliency, Scorer, Solver
from lvlm_prune.methods.allocation import DASAllocation
from lvlm_prune.methods.contract import refuse_misdeclared
from lvlm_prune.methods.patterns import SemiStructured, parse_pattern
from lvlm_prune.methods.pools import AsymmetricPool, MixedPool
from lvlm_prune.methods.saliency import DriftSaliency, RandomSaliency
from lvlm_prune.methods.scorers import SparseGPTScorer, WandaScorer
from lvlm_prune.methods.solvers import ALPSSolver
from lvlm_prune.plugins import built_from, describe, lazy_default, load_installed_plugins, mounted, plugin_class
from lvlm_prune.pruning.naming import folder_label
from lvlm_prune.recipes import options_of_method, recipe_file, recipe_names


def test_a_default_is_described_as_the_class_its_author_wrote():
    assert plugin_class(lazy_default(DriftSaliency)) is DriftSaliency
    assert plugin_class(AsymmetricPool()) is AsymmetricPool


def test_every_parameter_of_a_method_is_described():
    method = BlockwisePruning(pattern="2:4", pool=AsymmetricPool(RandomSaliency(seed=7), alpha=2.0), exclude="*.k_proj")
    described = describe(method)["init_args"]
    assert described["pattern"] == "2:4"
    assert described["exclude"] == ["*.k_proj"]
    pool = described["pool"]
    assert pool["class_path"].endswith("AsymmetricPool")
    assert pool["init_args"]["alpha"] == 2.0
    assert pool["init_args"]["rounding"] == "floor"
    assert pool["init_args"]["saliency"]["init_args"] == {"seed": 7}


def test_patterns_and_plain_data_are_described_as_they_are_written():
    assert describe({"pattern": SemiStructured(4, 8), "numbers": (1, 2.5, None)}) == {
        "pattern": "4:8",
        "numbers": [1, 2.5, None],
    }


def test_an_installed_package_registers_short_names(tmp_path, monkeypatch):
    (tmp_path / "loud_plugin.py").write_text(
        "from lvlm_prune.methods.saliency import Saliency\n"
        "class LoudSaliency(Saliency):\n"
        "    def __call__(self, tokens):\n"
        "        return tokens.hidden_out[tokens.visual].float().norm(dim=-1)\n"
    )
    information = tmp_path / "loud_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: loud-plugin\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[lvlm_prune.plugins]\nloud = loud_plugin:LoudSaliency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert "LoudSaliency" in [plugin.__name__ for plugin in load_installed_plugins()]
        from lvlm_prune.api import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(BlockwisePruning, "pruning")
        parsed = parser.parse_args(["--pruning.pool.saliency=LoudSaliency"])
        assert type(parser.instantiate(parsed).pruning.pool.saliency).__name__ == "LoudSaliency"
    finally:
        sys.modules.pop("loud_plugin", None)


def test_a_method_without_a_name_is_named_after_its_parts():
    from lvlm_prune.methods.scorers import MagnitudeScorer

    assert BlockwisePruning().name == "ATV"
    assert BlockwisePruning(pool=AsymmetricPool(RandomSaliency())).name == "asymmetric Wanda"
    assert BlockwisePruning(pool=MixedPool()).name == "mixed Wanda"
    assert BlockwisePruning(scorer=MagnitudeScorer()).name == "Magnitude"
    assert BlockwisePruning(pattern="2:4").run_label() == "atv-2of4"


def test_a_folder_is_named_after_the_recipe_as_it_is_typed():
    methods = {recipe: options_of_method(recipe_file(recipe), "method")["name"] for recipe in recipe_names()}
    for recipe, method in methods.items():
        one_of_several = list(methods.values()).count(method) > 1
        typed = method.lower() if one_of_several else recipe.replace("_", "-")
        assert folder_label(method, 0.6, parse_pattern("unstructured")) == f"{typed}-60"


# ---- which option an error is about ----------------------------------------------------------------------------------
class Picky:
    """Stands for any plugin: refuses one number when it is made, and another one when it works."""

    def __init__(self, number: float = 1.0, inner: object = None, parts: tuple = ()) -> None:
        if number < 0:
            raise ValueError(f"`number` {number}: must not be negative")
        self.number, self.inner, self.parts = number, inner, list(parts)

    def work(self) -> None:
        if self.number > 1:
            raise ValueError(f"`number` {self.number}: is too large")
        for plugin in [self.inner, *self.parts]:
            if plugin is not None:
                plugin.work()


class Holder:
    def __init__(self, scorer: Picky, sparsity: float = 0.5) -> None:
        self.scorer, self.sparsity = scorer, sparsity


@pytest.mark.parametrize(
    ("plugin", "option"),
    [
        (Picky(2.0), "--pruning.scorer.number 2: is too large"),
        (Picky(inner=Picky(3.0)), "--pruning.scorer.inner.number 3: is too large"),
        (Picky(parts=[Picky(), Picky(4.0)]), "--pruning.scorer.parts[1].number 4: is too large"),
    ],
)
def test_what_a_plugin_says_later_names_the_option_where_it_is_mounted(plugin, option):
    with pytest.raises(InputError) as error, mounted(pruning=Holder(plugin)):
        plugin.work()
    assert str(error.value) == option


def test_an_argument_of_the_run_itself_is_named_as_one():
    """`allocate` gets the sparsity of the run; what is wrong with it is no option of the allocation."""

    class Full(Picky):
        def work(self):
            raise ValueError("`sparsity` 0.9: cannot be reached")

    plugin = Full()
    with (
        pytest.raises(InputError, match=r"^--pruning.sparsity 0.9: cannot be reached$"),
        mounted(pruning=Holder(plugin)),
    ):
        plugin.work()


def _cannot_be_read(plugin, attribute):
    """A plugin of the same class but for one attribute, at which it raises as a mistake of its author would."""

    def fails(self):
        raise ZeroDivisionError("division by zero")

    plugin.__class__ = type("Odd", (type(plugin),), {attribute: property(fails), "__module__": "mine"})
    return plugin


@pytest.mark.parametrize(
    ("plugin", "kind"),
    [
        (WandaScorer(), Scorer),
        (MixedPool(), Pool),
        (DriftSaliency(), Saliency),
        (DASAllocation(), Allocation),
        (ALPSSolver(), Solver),
    ],
)
def test_an_attribute_that_cannot_be_read_is_a_fault_of_the_plugin(plugin, kind):
    names = {name for base in kind.__mro__[:-1] for name in vars(base) if not name.startswith("_")}
    said = r"^--pruning.scorer Odd: its attribute `{}` raises ZeroDivisionError: division by zero \(test_plugins"
    for name in names:
        odd = _cannot_be_read(copy.copy(plugin), name)
        with pytest.raises(InputError, match=said.format(name)), mounted(pruning=Holder(odd)):
            refuse_misdeclared(odd, kind)


def test_an_attribute_that_is_looked_up_in_vain_is_a_fault_of_the_plugin():
    class Odd(Picky):
        def __getattr__(self, name):
            return {}[name]

    odd = Odd()
    config = {"pruning": {"pool": {"class_path": f"{__name__}.{Odd.__qualname__}", "init_args": {}}}}
    said = r"^--pruning.pool Odd: its attribute `saliency` raises KeyError: 'saliency' \("
    for context in (built_from(config), mounted(**{"pruning.pool": odd})):
        with pytest.raises(InputError, match=said), context:
            assert odd.saliency


@pytest.mark.parametrize("error", [ValueError("too many values to unpack"), KeyError("a"), ValueError("`a` is no b")])
def test_a_mistake_in_a_plugin_stays_what_it_is(error):
    with pytest.raises(type(error)), mounted(pruning=Holder(Picky())):
        raise error


def test_broken_numbers_are_a_fault_of_the_run():
    with pytest.raises(RunError, match=r"^NaN in the drift$"), mounted(pruning=Holder(Picky())):
        raise FloatingPointError("NaN in the drift")


def test_of_several_parts_of_one_class_the_one_that_is_wrong_is_named():
    parts = [{"class_path": "a.Picky", "init_args": {"number": number}} for number in (1.0, -1.0, -2.0)]
    config = {"data": {"source": {"class_path": "b.Mixture", "init_args": {"parts": parts}}}}
    with pytest.raises(InputError, match=r"^--data.source.parts\[1\].number -1: "), built_from(config):
        [Picky(part["init_args"]["number"]) for part in parts]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_argument_is_named_however_deep_its_plugin_lies(depth):
    """Solvers in solvers may each be left out; jsonargparse reports each of these choices by itself."""
    solver = {"class_path": "SparseGPTSolver", "init_args": {"block_size": 0}}
    for outer in ("RefitSolver", "VisualWeightSolver")[:depth]:
        solver = {"class_path": outer, "init_args": {"start": solver}}
    with pytest.raises(InputError) as error:
        load_pruning("wanda", solver=solver)
    assert str(error.value) == f"--pruning.solver.{'start.' * depth}block_size 0: must be 1 or larger"


def test_a_method_made_in_python_says_what_is_wrong_with_an_argument():
    with pytest.raises(ValueError, match=r"^`damping` -1: must be a finite number, 0 or larger$"):
        BlockwisePruning(scorer=SparseGPTScorer(damping=-1))
    with pytest.raises(InputError, match=r"^--pruning.scorer.variant True: cannot be used with 2:4$"):
        BlockwisePruning(scorer=WandaScorer(variant=True), pattern="2:4")
    pruning = BlockwisePruning(allocation=DASAllocation(max_sparsity=0.4))
    with pytest.raises(InputError, match=r"^--pruning.allocation.max_sparsity 0.4: below"), mounted(pruning=pruning):
        pruning.allocation.check({}, 0.5)
