"""Every mistake of a user is one line that names the option and the value; status 2; nothing is written."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_prune.cli import main
from tests.conftest import ALL_SAMPLES, GOLDEN, GOLDEN_MODEL, MODEL

CALIBRATION = GOLDEN / "calib.safetensors"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run the command, expect refusal, and give the message."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, output: Path | None = None) -> str:
        folder = output or tmp_path / "out"
        existed = folder.exists()
        capsys.readouterr()
        assert main([*map(str, arguments), f"--output={folder}"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert folder.exists() == existed
        assert not (tmp_path / "runs").exists()
        return lines[0]

    return run


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return f"--config={path}"


OPTIONS = {
    "sparsity zero": (["--pruning.sparsity=0"], ["--pruning.sparsity 0:"]),
    "sparsity one": (["--pruning.sparsity=1"], ["--pruning.sparsity 1:"]),
    "sparsity above one": (["--pruning.sparsity=1.5"], ["--pruning.sparsity 1.5"]),
    "sparsity nan": (["--pruning.sparsity=nan"], ["--pruning.sparsity nan"]),
    "sparsity text": (["--pruning.sparsity=abc"], ["--pruning.sparsity abc"]),
    "sparsity against N:M": (
        ["--pruning.sparsity=0.6", "--pruning.pattern=2:4"],
        ["--pruning.sparsity 0.6", "contradicts pattern 2:4"],
    ),
    "N:M without M": (["--pruning.pattern=2:"], ["--pruning.pattern 2:"]),
    "N:M reversed": (["--pruning.pattern=4:2"], ["--pruning.pattern 4:2", "0 < N < M"]),
    "N:M with N zero": (["--pruning.pattern=0:4"], ["--pruning.pattern 0:4"]),
    "N:M indivisible": (["--pruning.pattern=3:7"], ["--pruning.pattern 3:7", "not divisible by 7"]),
    "unknown pool": (["--pruning.pool=NoPool"], ["--pruning.pool NoPool", "no such class"]),
    "class of another kind": (["--pruning.pool=WandaScorer"], ["--pruning.pool WandaScorer"]),
    "unknown module": (["--pruning.scorer=no.such.Scorer"], ["--pruning.scorer no.such.Scorer"]),
    "unknown option": (["--pruning.nothing=3"], ["--pruning.nothing", "unknown option"]),
    "option without its place": (["--sparsity=0.6"], ["--sparsity: unknown option; is --pruning.sparsity meant?"]),
    "option with a slip": (["--pruning.sparsty=0.6"], ["--pruning.sparsty: ", "is --pruning.sparsity meant?"]),
    "section as option": (["--model=checkpoint"], ["--model checkpoint: no such YAML file", "--model.NAME"]),
    "unknown plugin option": (["--pruning.pool.beta=3"], ["--pruning.pool.beta", "unknown option"]),
    "alpha negative": (["--pruning.pool.alpha=-1"], ["--pruning.pool.alpha -1:"]),
    "unknown rounding": (["--pruning.pool.rounding=up"], ["--pruning.pool.rounding up", "floor, released"]),
    "less than a weight": (["--pruning.sparsity=0.001"], ["--pruning.sparsity 0.001", "prunes nothing"]),
    "exclude matches nothing": (["--pruning.exclude=*.nothing"], ["--pruning.exclude *.nothing", "matches no Linear"]),
    "exclude everything": (["--pruning.exclude=*"], ["--pruning.exclude", "leaves nothing"]),
    "unknown modality": (["--pruning.visual=[smell]"], ["--pruning.visual smell"]),
    "bad flag": (["--pruning.record=maybe"], ["--pruning.record maybe", "bool"]),
    "bad dtype": (["--model.dtype=int8"], ["--model.dtype int8"]),
    "too many samples": (["--data.num_samples=9"], ["--data.num_samples 9", "only 8"]),
    "no samples": (["--data.num_samples=0"], ["--data.num_samples 0"]),
    "bad batch size": (["--data.batch_size=0"], ["--data.batch_size 0"]),
    "no such device": (
        ["--trainer.accelerator=cuda", "--trainer.devices=99"],
        ["--trainer."],
    ),
    "no such accelerator": (["--trainer.accelerator=quantum"], ["--trainer.accelerator quantum"]),
    "unsuitable strategy": (["--trainer.strategy=nothing"], ["--trainer.strategy nothing"]),
    "damping negative": (
        ["--pruning.scorer=SparseGPTScorer", "--pruning.scorer.damping=-1"],
        ["--pruning.scorer.damping -1:"],
    ),
    "column blocks of nothing": (
        ["--pruning.scorer=SparseGPTScorer", "--pruning.scorer.block_size=0"],
        ["--pruning.scorer.block_size 0"],
    ),
    "exponent negative": (
        ["--pruning.scorer=RIAScorer", "--pruning.scorer.exponent=-1"],
        ["--pruning.scorer.exponent -1:"],
    ),
    "variant with N:M": (
        ["--pruning.scorer=WandaScorer", "--pruning.scorer.variant=true", "--pruning.pattern=2:4"],
        ["--pruning.scorer.variant True", "2:4"],
    ),
    "resume without a folder": (["--resume=perhaps"], ["--resume perhaps"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option(case, refused, golden_arguments):
    arguments, said = OPTIONS[case]
    message = refused(*golden_arguments, *arguments)
    assert all(part in message for part in said), message


PROBE_OPTIONS = {
    "damping negative": (
        ["--probing.scorer=SparseGPTScorer", "--probing.scorer.damping=-1"],
        "--probing.scorer.damping -1: must be a finite number, 0 or larger",
    ),
    "no statistic": (["--probing.scorer=MagnitudeScorer"], "--probing.scorer MagnitudeScorer: uses no calibration"),
}


@pytest.mark.parametrize("case", PROBE_OPTIONS)
def test_bad_option_of_a_probe(case, refused):
    arguments, said = PROBE_OPTIONS[case]
    assert said in refused("probe", *GOLDEN_MODEL, *arguments)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            "class_path: TextSource\n        init_args: {path: w.txt, max_tokens: 0}",
            "sources[1].max_tokens 0: must",
        ),
        ("class_path: TextSource\n        init_args: {path: nowhere.txt}", "sources[1].path nowhere.txt: no such file"),
        ("class_path: LlavaJsonSource\n        init_args: {path: no.json}", "sources[1].path no.json: no such file"),
    ],
)
def test_a_part_of_a_mixture_names_its_own_path(part, said, refused, golden_arguments, tmp_path):
    (tmp_path / "w.txt").write_text("One.\n\nTwo.\n")
    config = yaml_file(
        tmp_path,
        "data:\n  source:\n    class_path: MixtureSource\n    init_args:\n      ratios: [1, 1]\n      sources:\n"
        "      - class_path: TextSource\n        init_args: {path: w.txt}\n"
        f"      - {part}\n",
    )
    model = [argument for argument in golden_arguments if not argument.startswith("--data")]
    assert f"--data.source.{said}" in refused(*model, config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pruning: [", "config.yaml"),
        ("pruning:\n  nothing: 3\n", "pruning.nothing"),
        ("nothing: 3\n", "nothing"),
        ("pruning: 3\n", "pruning"),
    ],
)
def test_bad_configuration_file(text, said, refused, golden_arguments, tmp_path):
    assert said in refused(*golden_arguments, yaml_file(tmp_path, text))


@pytest.mark.parametrize("option", ["pruning", "data", "trainer", "data.source", "pruning.scorer"])
@pytest.mark.parametrize("kind", ["pipe", "in itself"])
@pytest.mark.parametrize("place", ["command line", "configuration file"])
def test_a_file_of_options_without_an_end(place, kind, option, refused, golden_arguments, tmp_path):
    """A section, or a class with its options, may be a file too."""
    file, inner = tmp_path / "inner.yaml", option.rpartition(".")[2]
    os.mkfifo(file) if kind == "pipe" else file.write_text("pool: &p {pool: *p}")
    given = f"--{option}={file}"
    if place == "configuration file":
        section, dot, _ = option.partition(".")
        given = yaml_file(tmp_path, f"{section}: {{{inner}: inner.yaml}}" if dot else f"{option}: inner.yaml")
    said = "is no file" if kind == "pipe" else "is nested too deeply, or in itself"
    message = refused(*golden_arguments, given)
    assert f"--{option} " in message
    assert message.endswith(said)


def test_missing_configuration_file(refused, golden_arguments, tmp_path):
    assert "nowhere.yaml" in refused(*golden_arguments, f"--config={tmp_path / 'nowhere.yaml'}")


# ---- checkpoint folders ---------------------------------------------------------------------------------------------
def break_checkpoint(folder: Path, case: str) -> None:
    weights = folder / "model.safetensors"
    if case == "no config":
        (folder / "config.json").unlink()
    elif case == "config of another kind":
        (folder / "config.json").write_text("not json")
    elif case == "unknown architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "corrupt header":
        weights.write_bytes(struct.pack("<Q", 10) + b"not a header" + weights.read_bytes())
    elif case == "no weights":
        weights.unlink()
    elif case == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif case == "missing tensor":
        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if "layers.1.mlp.up_proj" in name))
        save_file(tensors, weights)
    elif case == "missing shard":
        tensors = load_file(weights)
        half = len(tensors) // 2
        parts = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
        weights.unlink()
        for number, part in enumerate(parts):
            save_file(part, folder / f"part{number}.safetensors")
        places = {name: f"part{number}.safetensors" for number, part in enumerate(parts) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (folder / "part1.safetensors").unlink()


CHECKPOINTS = {
    "no config": "config.json",
    "config of another kind": "config.json",
    "unknown architecture": "no_such_model",
    "truncated": "model.safetensors",
    "corrupt header": "model.safetensors",
    "no weights": "safetensors",
    "pickle": "safetensors",
    "missing tensor": "up_proj",
    "missing shard": "part1.safetensors",
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case, refused, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    break_checkpoint(tmp_path / "model", case)
    source = ["--data.source=TensorSource", f"--data.source.path={CALIBRATION}"]
    message = refused("prune", f"--model.path={tmp_path / 'model'}", *source)
    assert "--model.path" in message
    assert CHECKPOINTS[case] in message


def test_missing_folder_and_processor(refused, tmp_path):
    assert "--model.path" in refused("prune", f"--model.path={tmp_path / 'nowhere'}")
    (tmp_path / "text.txt").write_text("Some words.")
    text = ["--data.source=TextSource", f"--data.source.path={tmp_path / 'text.txt'}"]
    assert "tokenizer" in refused("prune", f"--model.path={MODEL}", *text)


# ---- calibration files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["missing", "empty", "truncated", "wrong keys", "gap", "no input_ids"])
def test_bad_calibration_file(case, refused, golden_arguments, tmp_path):
    path = tmp_path / "calib.safetensors"
    samples = load_file(CALIBRATION)
    if case == "empty":
        save_file({}, path)
    elif case == "truncated":
        path.write_bytes(CALIBRATION.read_bytes()[:-9])
    elif case == "wrong keys":
        save_file({"input_ids": samples["s0.input_ids"]}, path)
    elif case == "gap":
        save_file({name: value for name, value in samples.items() if not name.startswith("s3.")}, path)
    elif case == "no input_ids":
        samples.pop("s2.input_ids")
        save_file(samples, path)
    message = refused(*[a for a in golden_arguments if "source.path" not in a], f"--data.source.path={path}")
    assert "--data.source.path" in message
    assert str(path) in message


def test_visual_only_pool_without_visual_tokens(refused, tmp_path):
    ids = torch.arange(5, 45)[None]
    save_file({"s0.input_ids": ids, "s0.mm_token_type_ids": torch.zeros_like(ids)}, tmp_path / "text.safetensors")
    arguments = ["prune", f"--model.path={MODEL}", "--data.source=TensorSource"]
    arguments += [f"--data.source.path={tmp_path / 'text.safetensors'}", "--pruning.pool=VisualOnlyPool"]
    assert "--pruning.pool VisualOnlyPool: needs visual tokens" in refused(*arguments)


# ---- output folders -------------------------------------------------------------------------------------------------
def test_output_that_is_not_empty_keeps_what_is_there(refused, golden_arguments, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not lose me")
    assert "not empty" in refused(*golden_arguments, output=folder)
    assert "pruning.json" in refused(*golden_arguments, "--resume=true", output=folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_output_inside_the_input(refused, golden_arguments, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    arguments = [a for a in golden_arguments if "model.path" not in a] + [f"--model.path={tmp_path / 'model'}"]
    assert "inside the input" in refused(*arguments, output=tmp_path / "model" / "pruned")
    assert "inside the input" in refused(*arguments, output=tmp_path / "model")
    assert "holds the input" in refused(*arguments, output=tmp_path)


def test_output_that_is_a_file(refused, golden_arguments, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*golden_arguments, output=tmp_path / "file")


def test_output_that_is_a_broken_link(refused, golden_arguments, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    said = refused(*golden_arguments, output=tmp_path / "link")
    assert f"is a link to {tmp_path / 'gone'}, which does not exist" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(refused, golden_arguments, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission" in refused(*golden_arguments, output=tmp_path / "locked" / "out")


def test_full_disk_is_found_before_the_first_block(refused, golden_arguments, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert "only 1.0 kB are free" in refused(*golden_arguments)


# ---- what shows up only during the run ------------------------------------------------------------------------------
def with_changed(arguments, folder, part_of_name, change):
    """These arguments, with a copy of their model whose first weight of such a name is changed."""
    shutil.copytree(MODEL, folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    change(next(weight for name, weight in weights.items() if part_of_name in name))
    save_file(weights, folder / "model" / "model.safetensors")
    return [a for a in arguments if "model.path" not in a] + [f"--model.path={folder / 'model'}"]


def spoil(weight):
    weight[3, 5] = float("nan")


def test_nan_in_a_weight_ends_with_one_line_and_a_resumable_folder(golden_arguments, tmp_path, capsys):
    arguments = with_changed(golden_arguments, tmp_path, "layers.1.self_attn.o_proj", spoil)
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "layers.1.self_attn.o_proj" in error
    assert "NaN" in error
    assert len(error.splitlines()) == 1
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert manifest["status"] == "pruning"
    assert [block["index"] for block in manifest["blocks"]] == [0]


def test_nan_in_an_input_names_the_sample(golden_arguments, tmp_path, capsys):
    samples = load_file(CALIBRATION)
    samples["s5.pixel_values"][:] = float("nan")
    save_file(samples, tmp_path / "calib.safetensors")
    arguments = [a for a in golden_arguments if "source.path" not in a]
    arguments += [ALL_SAMPLES, f"--data.source.path={tmp_path / 'calib.safetensors'}", f"--output={tmp_path / 'out'}"]
    assert main(arguments) == 2
    assert "calibration sample 5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("factor", "pool", "said"),
    [
        (1e38, "AsymmetricPool", "layers.1, first in the output of mlp.up_proj, for calibration sample 0"),
        (1e21, "AsymmetricPool", "statistics of model.language_model.layers.1.mlp.down_proj for calibration sample 0"),
    ],
)
def test_overflow_names_block_linear_and_sample(factor, pool, said, golden_arguments, tmp_path, capsys):
    """Finite weights whose products are not: of one Linear, of the block, or only squared."""
    arguments = with_changed(golden_arguments, tmp_path, "layers.1.mlp.up_proj", lambda weight: weight.mul_(factor))
    assert main([*arguments, f"--pruning.pool={pool}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "NaN or infinity" in error
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_survey_names_the_broken_weight_too(golden_arguments, tmp_path, capsys):
    arguments = with_changed(golden_arguments, tmp_path, "layers.1.mlp.down_proj", spoil)
    assert main([*arguments, "--pruning.allocation=OWLAllocation", f"--output={tmp_path / 'out'}"]) == 2
    where = "block model.language_model.layers.1, first in mlp.down_proj.weight, for calibration sample 0"
    assert capsys.readouterr().err == f"error: NaN or infinity in the output of {where}\n"


def test_help_and_printed_configuration_work(run_cli, golden_arguments, tmp_path):
    assert "prune" in run_cli("--help").stdout
    shown = run_cli("prune", "--help").stdout
    assert all(option in shown for option in ("--pruning.sparsity", "--output"))
    printed = run_cli(*golden_arguments, "--pruning.pattern=2:4", "--print_config")
    assert "AsymmetricPool" in printed.stdout
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    finished = run_cli("prune", "--config=printed.yaml", "--output=out")
    assert finished.returncode == 0, finished.stderr
    assert "2:4" in finished.stdout
    assert finished.stderr == ""
