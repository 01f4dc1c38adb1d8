"""Which runs a grid stands for."""

import json
from itertools import pairwise

from lvlm_prune.data import CalibrationDataModule
from lvlm_prune.runs.sweep.grid import Grid
from tests.conftest import REPOSITORY


def points(*recipes: str, seeds=(0, 1), **options):
    grid = {name.replace("__", "."): values for name, values in options.items()}
    files = [str(REPOSITORY / "configs" / "prune" / f"{name}.yaml") for name in recipes]
    return Grid.of(files, grid, list(seeds), CalibrationDataModule(num_samples=4)).points()


def test_options_apply_where_they_can():
    """Wanda knows no alpha, 2:4 is 50%, and magnitude needs neither data nor a pool."""
    found = points("atv", "wanda", "atv_2of4", "magnitude", pruning__sparsity=[0.5, 0.6], pruning__pool__alpha=[0.5, 2])
    labels = [point.label for point in found]
    assert len(set(labels)) == len(labels)
    assert sorted(label for label in labels if not label.startswith("atv")) == [
        "magnitude · sparsity 0.5",
        "magnitude · sparsity 0.6",
        "wanda · sparsity 0.5 · seed 0",
        "wanda · sparsity 0.5 · seed 1",
        "wanda · sparsity 0.6 · seed 0",
        "wanda · sparsity 0.6 · seed 1",
    ]
    assert sum(label.startswith("atv ·") for label in labels) == 8
    assert sorted(label for label in labels if label.startswith("atv_2of4")) == [
        f"atv_2of4 · alpha {alpha} · seed {seed}" for alpha in ("0.5", "2") for seed in (0, 1)
    ]


def test_runs_on_the_same_samples_follow_each_other():
    found = points("atv", "wanda", pruning__sparsity=[0.5, 0.6], data__num_samples=[4, 5])
    keys = [point.data_key for point in found]
    assert len(found) == 16
    assert len(set(keys)) == 4
    assert sum(before != after for before, after in pairwise(keys)) == 3
    assert {point.config["data"]["num_samples"] for point in found} == {4, 5}


def test_a_plugin_can_be_swept_with_its_options():
    pools = [{"class_path": "AsymmetricPool", "init_args": {"k": 3}}, "MixedPool"]
    found = points("atv", seeds=[0], pruning__pool=pools, pruning__pool__alpha=[0.5, 2])
    assert [point.label for point in found] == [
        "atv · pool AsymmetricPool · alpha 0.5 · seed 0",
        "atv · pool AsymmetricPool · alpha 2 · seed 0",
        "atv · pool MixedPool · seed 0",
    ]
    first, _ = found[0].instantiate()
    assert (first.pool.k, first.pool.alpha) == (3, 0.5)


def test_a_mixture_of_sources_stays_plain_data():
    """The parser makes objects of the members of a list in place; a point is written, and compared, as data."""
    members = [{"class_path": "TextSource", "init_args": {"path": f"{name}.txt"}} for name in ("a", "b")]
    mixture = {"class_path": "MixtureSource", "init_args": {"sources": members, "ratios": [1, 1]}}
    found = points("wanda", seeds=[0], data__source=[mixture], pruning__sparsity=[0.5, 0.6])
    assert len({point.identity for point in found}) == 2
    found[0].instantiate()
    assert all(json.loads(json.dumps(point.config)) == point.config for point in found)


def test_the_same_point_keeps_its_identity_under_another_name(tmp_path):
    """So a renamed method is not run again, and a changed one is."""
    text = (REPOSITORY / "configs" / "prune" / "atv.yaml").read_text()
    (tmp_path / "atv.yaml").write_text(text.replace("name: ATV", "name: Other"))
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "atv.yaml").write_text(text.replace("alpha: 1.0", "alpha: 1.1"))
    data = CalibrationDataModule(num_samples=4)
    (same,) = Grid.of(str(tmp_path / "atv.yaml"), {}, 0, data).points()
    (changed,) = Grid.of(str(tmp_path / "changed" / "atv.yaml"), {}, 0, data).points()
    assert same.identity == points("atv", seeds=[0])[0].identity != changed.identity
