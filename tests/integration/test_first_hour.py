"""What the README says in passing works as it is said, and what goes wrong says the way out."""

import fnmatch
import json
import re

import pytest
from safetensors import safe_open

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from tests.conftest import MODEL
from tests.hub_folders import write_captions, write_folder

SMALL = ["--data.num_samples=2", "--held_back=0", "--trainer.accelerator=cpu"]


@pytest.fixture
def small(golden_arguments) -> list[str]:
    return [*golden_arguments, *SMALL]


@pytest.mark.parametrize("written", [["--trainer.logger", "CSVLogger"], ["--trainer.logger=CSVLogger"]])
def test_a_logger_that_wants_a_folder_gets_that_of_the_run(written, small, tmp_path):
    out = tmp_path / "out"
    assert main([*small, *written, f"--output={out}"]) == 0
    assert next(out.rglob("metrics.csv")).read_text()
    assert main([*small, *written, f"--output={out}", "--resume=true"]) == 0


def excluded(small, tmp_path, *names: str) -> set[str]:
    """Linears of the manifest that are not pruned when these names are excluded."""
    everything, rest = (tmp_path / one for one in ("everything", "rest"))
    if not everything.exists():
        assert main([*small, f"--output={everything}"]) == 0
    assert main([*small, f"--pruning.exclude={json.dumps(names)}", f"--output={rest}"]) == 0
    before, after = (json.loads((one / "pruning.json").read_text())["linears"].keys() for one in (everything, rest))
    return before - after


def test_names_are_excluded_as_they_are_printed(small, tmp_path, capsys):
    """By the manifest, by `--plan`, and by the checkpoint, whose names differ from one another."""
    assert main([*small, "--plan=true"]) == 0
    printed = next(line.split()[0] for line in capsys.readouterr().out.splitlines() if "up_proj" in line)
    with safe_open(MODEL / CheckpointFolder(MODEL).shards[0], "pt") as file:
        (key, *more) = fnmatch.filter(file.keys(), printed)
    names = excluded(small, tmp_path, printed)
    assert len(names) == len([key, *more])
    assert all(name.endswith("up_proj") for name in names)
    (tmp_path / "rest").rename(tmp_path / "without-all")
    (name,) = excluded(small, tmp_path, key)
    assert name != key
    for other in (name, f"{name}.weight", key.removesuffix(".weight")):
        (tmp_path / "rest").rename(tmp_path / f"as-{len(list(tmp_path.iterdir()))}")
        assert excluded(small, tmp_path, other) == {name}


def test_kinds_are_excluded_as_pages_and_logs_call_them(small, tmp_path):
    out = tmp_path / "everything"
    assert main([*small, "--trainer.logger=CSVLogger", f"--output={out}"]) == 0
    columns = next(out.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    labels = [column.removeprefix("sparsity/") for column in columns if column.startswith("sparsity/")]
    of_page = json.loads((out / "pruning.json").read_text())["linears"]
    assert labels
    for number, label in enumerate((labels[0], labels[0].rpartition(".")[2])):
        assert excluded(small, tmp_path, label) == {name for name in of_page if name.endswith(f".{label}")}
        (tmp_path / "rest").rename(tmp_path / str(number))


def test_what_is_excluded_of_both_towers_is_told_apart_as_on_the_page(tmp_path):
    write_folder(tmp_path / "dense", "llava")
    command = ["prune", f"--model.path={tmp_path / 'dense'}", "--method=magnitude", "--evaluate=false"]
    command += ["--model.targets=[language, vision]", "--report=false"]
    for label, in_tower in (("q_proj", False), ("vision q_proj", True), ("vision_tower*q_proj.weight", True)):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert main([*command, f"--pruning.exclude={label}", f"--output={out}"]) == 0
        left = [name for name in json.loads((out / "pruning.json").read_text())["linears"] if "q_proj" in name]
        assert left
        assert all(("vision" in name) != in_tower for name in left)


def test_a_name_without_its_beginning_or_end_excludes_what_it_is_part_of(small, tmp_path):
    assert main([*small, f"--output={tmp_path / 'everything'}"]) == 0
    of_manifest = json.loads((tmp_path / "everything" / "pruning.json").read_text())["linears"]
    name = next(name for name in of_manifest if ".1." in name)
    parts = name.split(".")
    place = parts.index("1")
    for number, part in enumerate((parts[place - 1 :], parts[: place + 1], parts[place - 1 : place + 2])):
        written = ".".join(part)
        assert excluded(small, tmp_path, written) == {one for one in of_manifest if f".{written}." in f".{one}."}
        (tmp_path / "rest").rename(tmp_path / str(number))


@pytest.mark.parametrize(
    ("targets", "name", "said"),
    [
        (
            "[language]",
            "vision fc1",
            "it is of the vision tower, which stays dense unless --model.targets names vision",
        ),
        ("[language]", "*vision*fc1", "--model.targets names vision"),
        ("[vision]", "down_proj", "--model.targets names language"),
        ("[language]", "lm_head", "what it matches stays dense anyway"),
        ("[language]", "nothing", "matches no Linear of the blocks that are pruned"),
    ],
)
def test_what_is_excluded_and_not_pruned_anyway_says_so(targets, name, said, tmp_path, capsys):
    write_folder(tmp_path / "dense", "llava")
    command = ["prune", f"--model.path={tmp_path / 'dense'}", "--method=magnitude", f"--model.targets={targets}"]
    capsys.readouterr()
    assert main([*command, f"--pruning.exclude={name}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --pruning.exclude {name}: matches no Linear")
    assert line.endswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pruning.experts=keep"], "--pruning.experts keep is not used: what is pruned has no routed experts"),
        (
            ["--pruning.rare_experts=keep", "--pruning.min_expert_tokens=3"],
            "--pruning.min_expert_tokens 3 and --pruning.rare_experts keep are not used: what is pruned has no",
        ),
        (["--data.padding_side=left"], "--data.padding_side left is not used: with --data.batch_size 1 nothing is"),
        (
            ["--method=magnitude", "--pruning.calibrate_on=dense", "--pruning.record=true", "--data.num_samples=2"],
            "--pruning.calibrate_on dense, --pruning.record true and --data.num_samples 2 are not used: Magnitude",
        ),
        (["--data.max_pixels=100"], "--data.max_pixels 100 is not used: the samples are ready-made model inputs"),
        (["--data.batch_size=2", "--data.padding_side=left"], ""),
        (["--pruning.visual=[audio]"], "--pruning.visual '[audio]' names no modality of the calibration samples"),
        (["--pruning.visual=[image]"], ""),
        (["--held_back=3", "--evaluate=false"], "--held_back 3 is not used: with --evaluate false nothing is measured"),
        (
            ["--packed=true", "--packed_size=0.9", "--pruning.sparsity=0.7"],
            "--pruning.sparsity 0.7 is not used: --packed_size says how sparse the model gets",
        ),
        (["--packed=true", "--packed_size=0.9", "--pruning.sparsity=0.5"], ""),
        (["--keep=0.01", "--pruning.sparsity=0.7"], "--pruning.sparsity 0.7 is not used: --keep says how sparse"),
        (["--keep=0.01", "--held_back=3"], ""),
    ],
)
@pytest.mark.parametrize("plan", ["true", "false"])
def test_options_that_change_nothing_are_said(options, said, plan, golden_arguments, tmp_path, capsys):
    quick = ["--held_back=0", "--report=false", f"--plan={plan}", f"--output={tmp_path / 'out'}"]
    assert main([*golden_arguments, *quick, *options]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if re.search("not used|names no", line)]
    assert len(found) == bool(said)
    assert "".join(found).startswith(said)


@pytest.mark.parametrize(("options", "said"), [([], 0), (["--held_back=8"], 0), (["--held_back=4"], 1)])
def test_nothing_is_said_of_options_that_nobody_gave(options, said, tmp_path, capsys):
    assert main(["prune", "--plan=true", f"--output={tmp_path / 'out'}", *options]) == 0
    assert capsys.readouterr().out.count("is not used") == said


def test_a_size_of_images_is_said_to_be_unused_where_there_are_none(tmp_path, capsys):
    write_folder(tmp_path / "dense", "llava")
    (tmp_path / "corpus.txt").write_text("\n\n".join(["One text.", "Another text."]))
    command = ["prune", f"--model.path={tmp_path / 'dense'}", "--method=wanda", "--held_back=0", "--report=false"]
    command += ["--data.source=TextSource", f"--data.source.path={tmp_path / 'corpus.txt'}", "--data.max_pixels=99"]
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 0
    assert "--data.max_pixels 99 is not used: no calibration sample has an image" in capsys.readouterr().out


def test_a_missing_image_says_that_it_can_be_left_out(tmp_path, capsys):
    data = write_captions(tmp_path / "images", 4)
    (data.parent / "2.png").unlink()
    source = [
        "--data.source=LlavaJsonSource",
        f"--data.source.path={data}",
        f"--data.source.image_folder={data.parent}",
    ]
    assert main(["prune", f"--model.path={MODEL}", *source, f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2.png" in line
    assert "--data.on_error skip" in line


def test_a_method_that_is_not_for_towers_names_one_that_is(small, tmp_path, capsys):
    assert main([*small, "--model.targets=[language, vision]", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--method wanda" in line
    assert main([*small, "--method=wanda", "--model.targets=[language, vision]", f"--output={tmp_path / 'out'}"]) == 0
    assert "--method best" not in capsys.readouterr().out  # which is not for towers


def test_an_input_that_was_pruned_before_is_noticed(small, tmp_path, capsys):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main([*small, "--pruning.sparsity=0.5", f"--output={once}"]) == 0
    assert "pruned before" not in capsys.readouterr().out
    assert json.loads((once / "pruning.json").read_text())["input_zeros"] < 0.01
    again = [f"--model.path={once}", "--pruning.sparsity=0.7", f"--output={twice}"]
    told = "about 50% of these weights are zero already, and count among the 70%"
    assert main([*small, *again, "--plan=true"]) == 0
    assert told in capsys.readouterr().out
    assert main([*small, *again]) == 0
    said = capsys.readouterr().out
    assert told in said
    assert "--method best" not in said  # which may give these zeros values
    assert json.loads((twice / "pruning.json").read_text())["input_zeros"] == pytest.approx(0.5, abs=0.02)
    one, other = CheckpointFolder(once), CheckpointFolder(twice)
    assert all(((other.read(key) == 0) | (one.read(key) != 0)).all() for key in one)


def test_zeros_of_the_input_are_kept_by_an_option_of_a_method_that_would_fill_them(small, tmp_path, capsys):
    once = tmp_path / "once"
    assert main([*small, "--pruning.sparsity=0.45", f"--output={once}"]) == 0
    one, filled = CheckpointFolder(once), {}
    for keep, told in (
        ("false", "--pruning.scorer.keep_zeros true keeps them zero"),
        ("true", "count among the 60%"),
    ):
        again = [f"--model.path={once}", "--method=sparsegpt", f"--pruning.scorer.keep_zeros={keep}"]
        assert main([*small, *again, "--pruning.sparsity=0.6", f"--output={tmp_path / keep}"]) == 0
        assert told in capsys.readouterr().out
        other = CheckpointFolder(tmp_path / keep)
        filled[keep] = any(((other.read(key) != 0) & (one.read(key) == 0)).any() for key in one)
    assert filled == {"false": True, "true": False}


def test_a_small_calibration_set_is_said_to_be_one(tmp_path, capsys):
    write_folder(tmp_path / "dense", "llava")
    data = write_captions(tmp_path / "images", 4)
    source = ["--data.source=LlavaJsonSource", f"--data.source.path={data}"]
    options = [
        f"--data.source.image_folder={data.parent}",
        *SMALL[1:],
        "--report=false",
        "--evaluate=false",
        f"--output={tmp_path / 'out'}",
    ]
    assert main(["prune", f"--model.path={tmp_path / 'dense'}", *source, *options]) == 0
    said = capsys.readouterr().out
    assert "calibration: 4 samples, all that the source has; 128 would be taken of more" in said
    assert f"--engine.benchmark.source.image_folder {data.parent}" in said
    assert f"ANSWERS.json --data.source.image_folder {data.parent}" in said
    options[-1] = f"--output={tmp_path / 'packed'}"
    assert main(["prune", f"--model.path={tmp_path / 'dense'}", *source, *options, "--packed=true"]) == 0
    assert f"--engine.benchmark.source.image_folder {data.parent}" in capsys.readouterr().out
    recovered = [options[0], "--report=false", "--trainer.max_epochs=1", f"--output={tmp_path / 'recovered'}"]
    assert main(["recover", f"--model.path={tmp_path / 'out'}", *source, *recovered]) == 0
    assert f"--engine.benchmark.source.image_folder {data.parent}" in capsys.readouterr().out
    options[-1] = f"--output={tmp_path / 'fewer'}"
    assert main(["prune", f"--model.path={tmp_path / 'dense'}", *source, *options, "--data.num_samples=3"]) == 0
    assert "calibration: 3 samples, as --data.num_samples says; 128 are the default" in capsys.readouterr().out


def test_samples_that_cannot_be_read_are_in_no_number_that_is_said(tmp_path, capsys, caplog):
    write_folder(tmp_path / "dense", "llava")
    data = write_captions(tmp_path / "images", 16)
    broken = sorted(data.parent.glob("*.png"))[:5]
    for image in broken:
        image.write_bytes(b"none")
    source = ["--data.source=LlavaJsonSource", f"--data.source.path={data}", "--data.on_error=skip"]
    source += [f"--data.source.image_folder={data.parent}", "--data.num_samples=10"]
    command = ["prune", f"--model.path={tmp_path / 'dense'}", *source, "--report=false"]
    said = {}
    for plan in ("true", "false"):
        assert main([*command, f"--plan={plan}", f"--output={tmp_path / 'out'}"]) == 0
        said[plan] = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    count, left_out = record["calibration"]["num_samples"], len(record["calibration"]["skipped"])
    assert (count + left_out, left_out > 0) == (10, True)
    assert all(f" · {count} samples\n" in text for text in said.values())
    few = f"calibration: {count} samples, as --data.num_samples says; 128 are the default ({left_out} more could not"
    assert all(few in text for text in said.values())
    assert record["quality"]["samples"] == 6 - (len(broken) - left_out)
    assert f"on {record['quality']['samples']} samples held back" in said["false"]
    named = [message for message in caplog.messages if message.startswith("left out held-back")]
    assert len(named) == len(broken) - left_out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine.top_k=5"], "--engine.top_k 5 is not used: there is no --baseline"),
        (
            ["--baseline=demo", "--engine.likelihood=false", "--engine.top_k=5"],
            "--engine.top_k 5 is not used: --engine.likelihood false",
        ),
        (["--baseline=demo", "--engine.top_k=5"], ""),
    ],
)
def test_options_of_an_engine_that_change_nothing_are_said(options, said, tmp_path, capsys):
    questions = ["--engine.benchmark.num_images=1", "--engine.benchmark.num_text=1", f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", *questions, *options]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert len(found) == bool(said)
    assert "".join(found).startswith(said)


def test_a_pool_of_visual_tokens_says_which_modalities_count_as_visual(golden_arguments, tmp_path, capsys):
    pool = "--pruning.pool=VisualOnlyPool"
    assert main([*golden_arguments, pool, "--pruning.visual=[audio]", f"--output={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "no calibration sample has any of --pruning.visual '[audio]', only image" in said
