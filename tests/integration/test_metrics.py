"""Numbers of every block go to Lightning's loggers while the run goes on."""

import csv
import json

import pytest

from lvlm_prune.cli import main
from tests.conftest import ALL_BLOCKS, GOLDEN_ARGUMENTS


def logged(folder):
    """Step -> everything logged at it."""
    steps: dict[int, dict[str, float]] = {}
    with next(folder.rglob("metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            found = {name: float(value) for name, value in row.items() if value and name != "step"}
            steps.setdefault(int(row["step"]), {}).update(found)
    return steps


def logger(folder):
    return ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}"]


def test_numbers_of_each_block_are_the_manifests(tmp_path):
    arguments = [*GOLDEN_ARGUMENTS, *logger(tmp_path / "logs"), "--pruning.sparsity=0.6"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    steps = logged(tmp_path / "logs")
    assert sorted(steps) == [0, 1]
    for block in manifest["blocks"]:
        found = steps[block["index"]]
        assert found["block/mean_drift"] == pytest.approx(block["mean_drift"])
        assert found["block/visual_tokens"] == pytest.approx(sum(block["visual_tokens"]) / 2)
        assert found["block/seconds/gather"] == pytest.approx(block["seconds"]["gather"])
        assert found["block/pool/text"] == block["pool"]["text"]
        name = f"{block['name']}.mlp.up_proj"
        assert found["sparsity/mlp.up_proj"] == manifest["linears"][name]["achieved"]
        assert found["error/mlp.up_proj"] == pytest.approx(manifest["linears"][name]["error"])
    assert steps[1]["run/sparsity"] == pytest.approx(manifest["sparsity"]["achieved"])


def test_surveys_are_logged_block_by_block(tmp_path):
    arguments = [*GOLDEN_ARGUMENTS, *logger(tmp_path / "logs"), "--pruning.allocation=DASAllocation"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    diversity = manifest["survey"]["allocation"]["diversity"]
    steps = logged(tmp_path / "logs")
    for name, value in diversity.items():
        index, linear = name.removeprefix("model.language_model.layers.").split(".", 1)
        assert steps[int(index)][f"survey/allocation/diversity/{linear}"] == pytest.approx(value)
    assert all(found["survey/seconds"] > 0 for found in steps.values())


def test_what_a_run_that_dies_had_found_is_there(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from lvlm_prune.callbacks import PruneCallback\n\n\n"
        "class Break(PruneCallback):\n"
        "    def on_block_start(self, trainer, pl_module, block):\n"
        "        if block.index == 2:\n"
        "            raise RuntimeError('lights out')\n"
    )
    arguments = [*GOLDEN_ARGUMENTS, ALL_BLOCKS, *logger(tmp_path / "logs"), "--trainer.callbacks+=broken.Break"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(RuntimeError, match="lights out"):
            main([*arguments, f"--output={tmp_path / 'out'}"])
    assert sorted(logged(tmp_path / "logs")) == [0, 1]
    again = [*GOLDEN_ARGUMENTS, ALL_BLOCKS, *logger(tmp_path / "logs"), f"--output={tmp_path / 'out'}", "--resume=true"]
    assert main(again) == 0
    versions = tmp_path / "logs" / "lightning_logs"
    before, whole = (logged(versions / f"version_{number}") for number in (0, 1))
    assert sorted(whole) == [0, 1, 2, 3]
    assert all(whole[block] == pytest.approx(before[block]) for block in (0, 1))
    assert main(again) == 0
    assert len(list(versions.iterdir())) == 2, "nothing was done, and there is nothing to log"
