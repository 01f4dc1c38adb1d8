"""Plugins are found, and said by name with everything they were made with."""

import sys

from jsonargparse import lazy_instance

from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.methods.patterns import SemiStructured
from lvlm_prune.methods.pools import AsymmetricPool
from lvlm_prune.methods.saliency import DriftSaliency, RandomSaliency
from lvlm_prune.plugins import describe, load_installed_plugins, plugin_class


def test_a_default_is_described_as_the_class_its_author_wrote():
    assert plugin_class(lazy_instance(DriftSaliency)) is DriftSaliency
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
    from lvlm_prune.methods.pools import MixedPool
    from lvlm_prune.methods.scorers import MagnitudeScorer

    assert BlockwisePruning().name == "ATV"
    assert BlockwisePruning(pool=AsymmetricPool(RandomSaliency())).name == "asymmetric Wanda"
    assert BlockwisePruning(pool=MixedPool()).name == "mixed Wanda"
    assert BlockwisePruning(scorer=MagnitudeScorer()).name == "Magnitude"
    assert BlockwisePruning(pattern="2:4").run_label() == "atv-2of4"
