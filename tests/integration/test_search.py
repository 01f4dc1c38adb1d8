"""`prune --keep`: the sparsest model that keeps a given share."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.units import readable_percent
from lvlm_prune.recipes import with_recipe
from lvlm_prune.report.pruning import summarise
from lvlm_prune.runs.prune.quality import SampleQuality
from lvlm_prune.runs.search.levels import LEVELS, Bracket, best_of, sparsity_of
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS


def tried(bracket: Bracket, most: int) -> list[int]:
    levels = []
    while level := bracket.next():
        bracket.note(level, level <= most)
        levels.append(level)
    return levels


@pytest.mark.parametrize("most", range(LEVELS + 1))
def test_the_last_level_that_keeps_enough_is_found(most: int) -> None:
    bracket = Bracket()
    assert len(tried(bracket, most)) <= LEVELS.bit_length()
    assert bracket.low == most
    for known in range(1, most + 1):
        better = Bracket(low=known)
        assert all(level > known for level in tried(better, most))
        assert better.low == most


def test_the_sparsest_recipe_wins_and_the_cheaper_one_of_two_equals() -> None:
    assert best_of({"fast": Bracket(low=3), "best": Bracket(low=5)}) == ("best", 5)
    assert best_of({"fast": Bracket(low=5), "best": Bracket(low=5)}) == ("fast", 5)
    assert best_of({"fast": Bracket()}) is None


@pytest.fixture
def fake_quality(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Agreement by sparsity alone, so that a test knows what is to be found; the list has every sparsity measured."""
    return measured_by_sparsity(monkeypatch)


def measured_by_sparsity(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    measured: list[float] = []

    def quality(self, written) -> dict:
        manifest = Manifest.read(written.path)
        sparsity, bonus = (
            manifest["sparsity"]["target"],
            0.1 if manifest["method"]["init_args"]["name"] == "Wanda" else 0,
        )
        measured.append(sparsity)
        return {"agreement": min(1.0, 1.2 - sparsity + bonus), "kl": sparsity, "samples": 1, "tokens": 9}

    monkeypatch.setattr(SampleQuality, "__call__", quality)
    return measured


def arguments(output: Path, *more: str, method: str = "wanda") -> list[str]:
    """A search in which each try calibrates on two samples."""
    golden = [*GOLDEN_ARGUMENTS[1:], "--data.num_samples=2"]
    return [*with_recipe([GOLDEN_ARGUMENTS[0], "--method", method]), *golden, f"--output={output}", *more]


def test_a_model_is_pruned_as_far_as_it_keeps_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], blank_figures
) -> None:
    assert main(arguments(tmp_path / "out", "--keep=0.6", "--held_back=4", "--report=true")) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    found = record["search"]
    assert found["agreement"] >= 0.6
    above = [one for one in found["tries"] if one["level"] == found["level"] + 1]
    assert found["level"] == LEVELS or above[0]["agreement"] < 0.6
    assert record["sparsity"]["target"] == pytest.approx(found["sparsity"])
    assert record["verified"]
    seconds = summarise(record)["seconds"]
    assert sum(one["seconds"] for one in found["tries"]) <= seconds["finding the sparsity"] < record["work_seconds"]
    assert sum(seconds.values()) == pytest.approx(record["work_seconds"])
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert all(f'data-path="search/tries/{place}/agreement"' in page for place in range(len(found["tries"])))
    assert f"the highest of {len(found['tries'])} tries that keeps 60.0% of the dense model's" in card
    assert f"at {readable_percent(found['sparsity'])} keeps {found['agreement']:.1%}" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["pruning"]["sparsity"] == found["sparsity"]
    assert "keep" not in config
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.private"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[list[float], dict]:
    """The sparsities that a search tries that nobody interrupts, and what it says of itself."""
    folder = tmp_path_factory.mktemp("search") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        measured = measured_by_sparsity(patched)
        assert main(arguments(folder, "--keep=0.745", "--held_back=0")) == 0
    return measured, json.loads((folder / "pruning.json").read_text())["search"]


@pytest.mark.parametrize(("tries", "is_changed"), [(0, False), (2, False), (2, True)])
def test_an_interrupted_search_goes_on_behind_the_last_try(
    tries: int, is_changed: bool, uninterrupted, tmp_path: Path, fake_quality, monkeypatch
) -> None:
    """A try that says it was another one is made again."""
    whole, expected = uninterrupted
    quality = SampleQuality.__call__

    def interrupted(self, written) -> dict:
        if len(fake_quality) == tries:
            raise KeyboardInterrupt
        return quality(self, written)

    monkeypatch.setattr(SampleQuality, "__call__", interrupted)
    assert main(arguments(tmp_path / "out", "--keep=0.745", "--held_back=0")) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(SampleQuality, "__call__", quality)
    if is_changed:
        tried = tmp_path / "out.search" / "search.jsonl"
        *lines, last = map(json.loads, tried.read_text().splitlines())
        del last["digest"]
        tried.write_text("".join(json.dumps(line) + "\n" for line in [*lines, last | {"level": 1}]))
    assert main(arguments(tmp_path / "out", "--keep=0.745", "--held_back=0")) == 0
    assert fake_quality == whole[:tries] + whole[tries - is_changed :]
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())["search"]
    assert found["level"] == expected["level"]
    assert found["sparsity"] == 0.55  # 1.3 - 0.55 is 0.75, 1.3 - 0.575 too little


@pytest.mark.parametrize("interrupted", ["search", "last run"])
def test_tries_on_other_held_back_samples_are_not_gone_on_with(
    interrupted: str, tmp_path: Path, fake_quality, monkeypatch, capsys
) -> None:
    """The samples that calibrate are the same."""
    samples = load_file(GOLDEN / "calib.safetensors")
    save_file(samples, tmp_path / "samples.safetensors")
    more = ["--keep=0.745", "--held_back=2", "--data.num_samples=3", "--data.source=TensorSource"]
    more.append(f"--data.source.path={tmp_path / 'samples.safetensors'}")
    quality, write = SampleQuality.__call__, Manifest.write

    def stopped_try(self, written) -> dict:
        if len(fake_quality) == 2:
            raise KeyboardInterrupt
        return quality(self, written)

    def stopped_run(self, folder: Path, *name: str) -> None:
        write(self, folder, *name)
        if folder.name == "out" and len(self.get("blocks", [])) == 2:
            raise KeyboardInterrupt

    if interrupted == "search":
        monkeypatch.setattr(SampleQuality, "__call__", stopped_try)
    else:
        monkeypatch.setattr(Manifest, "write", stopped_run)
    assert main(arguments(tmp_path / "out", *more)) == 130
    monkeypatch.setattr(SampleQuality, "__call__", quality)
    monkeypatch.setattr(Manifest, "write", write)
    chosen = set(TensorSource(str(tmp_path / "samples.safetensors")).choose(3, 0))
    for number in set(range(8)) - chosen:
        samples[f"s{number}.input_ids"][0, -1] ^= 1
    save_file(samples, tmp_path / "samples.safetensors")
    fake_quality.clear()
    capsys.readouterr()
    again = main(arguments(tmp_path / "out", *more, f"--resume={'true' if interrupted == 'last run' else 'false'}"))
    assert again == 2
    assert not fake_quality
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --data.source TensorSource: gives other samples to measure on now")


def test_the_recipe_that_gets_sparsest_is_taken(tmp_path: Path, fake_quality) -> None:
    assert main(arguments(tmp_path / "out", "--keep=0.745", "--held_back=0", "--keep_recipes=[magnitude]")) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["search"]["recipe"] == record["method"]["init_args"]["name"] == "Wanda"
    of = {
        name: [one["sparsity"] for one in record["search"]["tries"] if one["recipe"] == name]
        for name in ("magnitude", "Wanda")
    }
    assert min(of["Wanda"]) > 0.45  # what the weaker one keeps is not tried again
    assert 0.45 in of["magnitude"]


def test_with_a_vision_tower_the_last_run_is_what_its_configuration_gives(tmp_path: Path, fake_quality) -> None:
    """Behind a pruned tower the samples are others in each try; nothing of them is shared."""
    both = "--model.targets=[vision, language]"
    assert main(arguments(tmp_path / "out", "--keep=0.745", "--held_back=0", both)) == 0
    config = f"--config={tmp_path / 'out.private' / 'config.yaml'}"
    assert main(["prune", config, "--report=false", "--held_back=0", f"--output={tmp_path / 'again'}"]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_try_begins_that_would_end_too_late(tmp_path: Path, fake_quality, capsys) -> None:
    assert main(arguments(tmp_path / "out", "--keep=0.745", "--held_back=0", "--keep_minutes=1e-6")) == 0
    assert fake_quality == [sparsity_of((LEVELS + 1) // 2)]
    assert "no further try" in capsys.readouterr().out


def test_a_plan_says_how_many_runs_it_takes(tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path / "out", "--keep=0.745", "--held_back=0", "--plan=true")) == 0
    assert f"up to {LEVELS.bit_length()} tries" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--keep=1.5"], "--keep 1.5"),
        (["--keep=nan"], "--keep nan"),
        (["--keep=-1"], "--keep -1"),
        (["--keep=0.9", "--keep_minutes=-1"], "--keep_minutes -1"),
        (["--keep=0.9", "--keep_recipes=[wandaa]"], "--keep_recipes wandaa"),
        (["--keep=0.9", f"--keep_recipes=[{'a' * 300}]"], "--keep_recipes aaa"),
        (["--keep=0.9", "--keep_recipes=[atv_2of4]"], "--keep_recipes atv_2of4: prunes 2:4"),
        (["--keep_recipes=[fast]"], "--keep 0: --method auto and --keep_recipes want the share"),
        (["--keep=0.9", "--pruning.pattern=2:4"], "--pruning.pattern 2:4"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, capsys, given: list[str], named: str) -> None:
    assert main(arguments(tmp_path / "out", *given)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named}"), error
    assert not list(tmp_path.iterdir())


def test_a_share_that_nothing_keeps_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(SampleQuality, "__call__", lambda self, written: {"agreement": 0.5, "kl": 1.0})
    assert main(arguments(tmp_path / "out", "--keep=0.9")) == 2
    assert "no try keeps as much" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_the_searchs_own_stays(tmp_path, fake_quality):
    begun = tmp_path / "out.search"
    begun.mkdir()
    (begun / "search.jsonl").touch()
    (begun / "notes.txt").write_text("mine")
    assert main(arguments(tmp_path / "out", "--keep=0.7")) == 0
    assert [path.name for path in begun.iterdir()] == ["notes.txt"]


def test_a_try_that_is_a_link_is_one_line(tmp_path, fake_quality, capsys):
    (tmp_path / "precious").mkdir()
    begun = tmp_path / "out.search"
    begun.mkdir()
    (begun / "search.jsonl").touch()
    (begun / "try").symlink_to(tmp_path / "precious")
    assert main([*GOLDEN_ARGUMENTS, "--keep=0.7", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {begun / 'try'}: is a link to {tmp_path / 'precious'}")
    assert len(error.splitlines()) == 1
    assert (tmp_path / "precious").is_dir()
