"""`compare`: differences of two runs are those of their records and their weights."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lvlm_prune.cli import main
from lvlm_prune.output.private import without_private
from lvlm_prune.output.units import readable_percent
from lvlm_prune.report.comparison import comparison_page
from lvlm_prune.runs.compare.folders import ComparedFolder
from lvlm_prune.runs.compare.run import different
from tests.conftest import GOLDEN, GOLDEN_ARGUMENTS, MODEL, REPOSITORY
from tests.hub_folders import write_folder
from tests.pages import Page, refuse_other_numbers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The reference model pruned in three ways; the third run took other data as well."""
    folder = tmp_path_factory.mktemp("compare")
    runs = {
        "wanda": ("wanda", "--pruning.sparsity=0.5"),
        "das": ("das", "--pruning.sparsity=0.6"),
        "seed": ("wanda", "--data.num_samples=3", "--data.seed=1"),
    }
    for name, (recipe, *options) in runs.items():
        config = f"--config={REPOSITORY / 'configs' / 'prune' / f'{recipe}.yaml'}"
        arguments = [*GOLDEN_ARGUMENTS[1:], "--evaluate=true", *options, f"--output={folder / name}"]
        assert main([GOLDEN_ARGUMENTS[0], config, *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def record(folders):
    out = folders / "out"
    assert main(["compare", *(str(folders / name) for name in ("wanda", "das", "seed")), f"--output={out}"]) == 0
    return json.loads((out / "compare.json").read_text())


def test_settings_that_differ_and_no_others(record):
    settings = record["settings"]
    assert settings["pruning.sparsity"] == ["0.5", "0.6", "0.5"]
    assert settings["data.seed"] == ["0", "0", "1"]
    assert settings["data.num_samples"] == ["2", "2", "3"]
    assert len(set(settings["fingerprint of the data"])) == 2
    assert settings["pruning.allocation"] == ["UniformAllocation", "DASAllocation", "UniformAllocation"]
    assert not {"output", "data.source.path", "fingerprint of the input", "versions.torch"} & settings.keys()
    assert all(len(set(values)) > 1 for values in settings.values())
    assert not any(key.startswith("pruning.allocation.") for key in settings), "options of a class the other has not"


def test_a_number_of_python_is_that_of_the_command_line():
    folders = [ComparedFolder.__new__(ComparedFolder) for _ in range(2)]
    for folder, alpha in zip(folders, (1, 1.0)):
        pool = {"class_path": "lvlm_prune.methods.pools.AsymmetricPool", "init_args": {"alpha": alpha}}
        folder.record, folder.verb = {"config": {"pruning": {"pool": pool}}}, "prune"
    assert [folder.settings["pruning.pool.alpha"] for folder in folders] == ["1", "1"]


def test_a_class_without_options_is_named():
    settings = [{"pool": "MixedPool"}, {"pool": "AsymmetricPool", "pool.alpha": "1.0"}, {"pool": "AsymmetricPool"}]
    assert different(settings) == {"pool": ["MixedPool", "AsymmetricPool", "AsymmetricPool"]}
    folder = ComparedFolder.__new__(ComparedFolder)
    pool = {"class_path": "lvlm_prune.methods.pools.MixedPool", "init_args": {}}
    folder.record, folder.verb = {"config": {"pruning": {"pool": pool}}}, "prune"
    assert folder.settings["pruning.pool"] == "MixedPool"


def test_overlap_and_sparsity_are_those_of_the_weights(record, folders):
    tensors = {name: load_file(folders / name / "model.safetensors") for name in ("wanda", "das", "seed")}
    order = list(tensors)
    manifest = json.loads((folders / "wanda" / "pruning.json").read_text())
    assert [(pair["first"], pair["second"]) for pair in record["overlap"]] == [(0, 1), (0, 2), (1, 2)]
    for pair in record["overlap"]:
        ours, theirs = tensors[order[pair["first"]]], tensors[order[pair["second"]]]
        both, either, checked = 0, 0, 0
        for key in ours:
            parts = key.split(".")
            if parts[-2] not in pair["kinds"] or parts[-1] != "weight" or "visual" in key:
                continue
            kept, other = ours[key] != 0, theirs[key] != 0
            block = next(part for part in parts if part.isdecimal())
            expected = (kept & other).sum().item() / (kept | other).sum().item()
            assert pair["kinds"][parts[-2]][block] == pytest.approx(expected)
            both, either, checked = (
                both + (kept & other).sum().item(),
                either + (kept | other).sum().item(),
                checked + 1,
            )
        assert checked == pair["linears"] == len(manifest["linears"])
        assert pair["mean"] == pytest.approx(both / either)
    for name, entry in manifest["linears"].items():
        kind, block = name.rpartition(".")[2], str(entry["block"])
        assert record["sparsity"][0][kind][block] == pytest.approx(entry["achieved"])
    assert record["folders"][1]["sparsity"] > record["folders"][0]["sparsity"]


def test_page_and_table_show_the_record(record, folders):
    page = Page((folders / "out" / "report.html").read_text())
    page.text = ""  # names of folders and settings may hold digits
    refuse_other_numbers(page, record)
    assert page.figures == ["sparsity", "overlap-0-1", "overlap-0-2", "overlap-1-2"]
    assert {path.stem for path in (folders / "out" / "report").glob("*.png")} == set(page.figures)
    text = (folders / "out" / "report.html").read_text()
    table = (folders / "out" / "compare.md").read_text()
    for digest in record["settings"]["fingerprint of the data"]:
        assert all(digest[:10] in one and digest not in one for one in (text, table)), "a digest would stretch a table"
    assert f"wanda and das: {record['overlap'][0]['mean']:.3f} over" in table
    assert "| pruning.sparsity | 0.5 | 0.6 | 0.5 |" in table


def test_what_is_the_same_everywhere_is_a_sentence_and_no_chart(folders, tmp_path):
    """Two uniform sparsities are flat lines, and a folder keeps the same weights as a copy of itself."""
    shutil.copytree(folders / "wanda", tmp_path / "copy")
    compared = [str(folders / "wanda"), str(folders / "seed"), str(tmp_path / "copy"), f"--output={tmp_path / 'out'}"]
    assert main(["compare", *compared]) == 0
    page, table = ((tmp_path / "out" / name).read_text() for name in ("report.html", "compare.md"))
    assert Page(page).figures == ["overlap-0-1", "overlap-1-2"]
    assert "Each folder is about as sparse in each of its blocks" in page
    assert "The overlap of wanda and copy is about the same in each block and kind of Linear." in page
    assert "Each folder is about as sparse in each of its blocks" in table
    assert "sparsity of block" not in table
    assert "wanda and copy: 1.000 over 14 Linears, about the same in each block and kind" in table


def test_distance_from_the_dense_model_is_shown_where_nobody_scored(record, folders):
    own = json.loads((folders / "wanda" / "pruning.json").read_text())["quality"]
    found = record["folders"][0]["quality"]
    assert (found["perplexity"], found["kl"], found["agreement"]) == (own["perplexity"], own["kl"], own["agreement"])
    text, table = ((folders / "out" / name).read_text() for name in ("report.html", "compare.md"))
    assert f"KL from the dense model | {own['kl']:.4g} |" in table
    assert "input of pruning" not in table + text
    assert f"({own['tokens']} text tokens)" in table
    assert f'data-path="folders/0/quality/kl" data-unit="measure">{own["kl"]:.4g}<' in text


def test_distances_of_models_that_were_pruned_twice_are_not_called_distances_from_a_dense_one(
    folders, golden_arguments, tmp_path
):
    twice = [f"--model.path={folders / 'wanda'}", "--pruning.sparsity=0.7", "--evaluate=true"]
    assert main([*golden_arguments, *twice, f"--output={tmp_path / 'twice'}"]) == 0
    compared = [str(folders / "wanda"), str(tmp_path / "twice"), f"--output={tmp_path / 'out'}"]
    assert main(["compare", *compared]) == 0
    page, table = ((tmp_path / "out" / name).read_text() for name in ("report.html", "compare.md"))
    assert "from the dense model" not in page + table
    assert "Distance from the input of pruning" in page
    assert "| input of pruning | dense | sparse |" in table


def test_maps_of_all_pairs_have_one_colour_scale(record):
    _, figures = comparison_page(record)
    maps = [figure.drawing.axes[0].collections[0] for figure in figures if figure.name.startswith("overlap")]
    assert len(maps) == 3
    assert len({(one.norm.vmin, one.norm.vmax) for one in maps}) == 1
    assert len({one.get_array().min() for one in maps}) > 1


def test_a_folder_and_itself_are_the_same(folders, capsys):
    assert main(["compare", str(folders / "das"), str(folders / "das")]) == 0
    said = capsys.readouterr().out
    assert "All settings are the same." in said
    assert "1.000 over" in said


def test_private_parts_are_not_compared(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("a", "a.private", "b")]
    assert main(["compare", *names[:2]]) == 2
    assert capsys.readouterr().err == f"error: compare {names[0]}: name two folders or more\n"
    assert main(["compare", names[1], names[2]]) == 2
    assert capsys.readouterr().err == f"error: {names[1]}: holds only what is private of {names[0]}; compare that\n"


def test_retention_of_evaluated_folders_is_shown(folders, tmp_path, capsys):
    """What `evaluate` wrote beside a checkpoint."""
    task = {"score": 0.4, "baseline": 0.5, "retention": 0.8, "questions": 10}
    found = {"tasks": {"color": task}, "average": 0.4, "baseline_average": 0.5, "retention": 0.8}
    path = folders / "wanda" / "evaluation.json"
    path.write_text(json.dumps(found))
    assert main(["compare", str(folders / "wanda"), str(folders / "das"), f"--output={tmp_path / 'out'}"]) == 0
    path.unlink()
    said = capsys.readouterr().out
    assert "| retained | 80.0% | – |" in said
    assert "| color | 40.0% | – |" in said
    assert 'data-path="folders/0/retention"' in (tmp_path / "out" / "report.html").read_text()


def test_a_task_with_the_name_of_a_file_is_the_same_in_a_published_folder(folders, tmp_path, capsys):
    source = {"class_path": "LlavaJsonSource", "init_args": {"path": "/home/me/patients.json"}}
    benchmark = {"class_path": "LocalBenchmark", "init_args": {"source": source}}
    task = {"score": 0.4, "baseline": 0.5, "retention": 0.8, "questions": 10}
    found = {"tasks": {"patients": task}, "average": 0.4, "baseline_average": 0.5, "retention": 0.8, "asked": "5c"}
    found["engine"] = {"class_path": "BuiltinEngine", "init_args": {"benchmark": benchmark}}
    evaluated = {"wanda": found, "seed": without_private(found)}
    for name, record in evaluated.items():
        shutil.copytree(folders / name, tmp_path / name)
        (tmp_path / name / "evaluation.json").write_text(json.dumps(record))
    assert main(["compare", *(str(tmp_path / name) for name in evaluated)]) == 0
    said = capsys.readouterr().out
    assert "warning" not in said
    assert "| own questions | 40.0% | 40.0% |" in said


def test_blocks_of_the_decoder_have_the_same_numbers_where_a_tower_was_pruned_before_them(tmp_path):
    write_folder(tmp_path / "dense", "llava")
    command = ["prune", f"--model.path={tmp_path / 'dense'}", "--method=magnitude", "--evaluate=false"]
    for name, targets in (("decoder", "[language]"), ("both", "[language, vision]")):
        more = ["--report=false", f"--model.targets={targets}", f"--output={tmp_path / name}"]
        assert main([*command, *more]) == 0
    compared = ["compare", str(tmp_path / "decoder"), str(tmp_path / "both"), f"--output={tmp_path / 'out'}"]
    assert main(compared) == 0
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    decoder, both = record["sparsity"]
    assert decoder["all"] == both["all"]
    assert decoder["q_proj"].keys() == both["q_proj"].keys()
    assert any(kind.startswith("vision ") for kind in both)
    assert all(of.keys() <= decoder["all"].keys() for of in record["overlap"][0]["kinds"].values())


@pytest.mark.parametrize(
    ("of_second", "warned"),
    [
        ({}, ""),
        ({"asked": "9a"}, "they were scored on different questions"),
        ({"asked": "content:9a"}, "one was scored by an older version"),
        (
            {"tasks": {"color": {"score": 0.4, "baseline": 0.5, "retention": 0.8, "questions": 90}}},
            "they were scored on different questions",
        ),
    ],
)
def test_scores_on_other_questions_are_not_compared_in_silence(of_second, warned, folders, tmp_path, capsys):
    task = {"score": 0.4, "baseline": 0.5, "retention": 0.8, "questions": 10}
    found = {"tasks": {"color": task}, "average": 0.4, "baseline_average": 0.5, "retention": 0.8, "asked": "5c"}
    evaluated = {"wanda": found, "das": found | of_second}
    for name, record in evaluated.items():
        shutil.copytree(folders / name, tmp_path / name)
        (tmp_path / name / "evaluation.json").write_text(json.dumps(record))
    assert main(["compare", *(str(tmp_path / name) for name in evaluated)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"warning: {warned}") if warned else not first.startswith("warning")


def test_models_that_have_nothing_in_common(folders, tmp_path, capsys):
    """Another model, with other shapes: sparsity is compared, masks are not."""
    manifest = json.loads((folders / "wanda" / "pruning.json").read_text())
    manifest["linears"] = {f"another.{name}": entry for name, entry in manifest["linears"].items()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pruning.json").write_text(json.dumps(manifest))
    assert main(["compare", str(folders / "wanda"), str(tmp_path / "other")]) == 0
    assert "no Linear of the same name and shape" in capsys.readouterr().out


def test_a_recovered_folder_keeps_the_mask_of_its_base(bases, recover, tmp_path, capsys):
    base, out = bases / "unstructured-float32", tmp_path / "recovered"
    assert recover(base, out, "--trainer.max_epochs=1") == 0
    said = capsys.readouterr().out
    assert f"next: lvlm-prune evaluate --model.path {out} --baseline " in said
    assert f"lvlm-prune pack --model.path {out}" in said
    assert main(["compare", str(base), str(out), f"--output={tmp_path / 'out'}"]) == 0
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["settings"]["command"] == ["prune", "recover"]
    assert not any(key.startswith(("lora.", "optimization.")) for key in record["settings"]), (
        "prune has no such options"
    )
    assert math.isclose(record["overlap"][0]["mean"], 1)
    assert record["sparsity"][0] == record["sparsity"][1]
    again = tmp_path / "again"
    data = ["--data.source=TensorSource", f"--data.source.path={GOLDEN / 'calib.safetensors'}"]
    options = ["--pruning.sparsity=0.8", "--evaluate=false", "--report=false", "--trainer.accelerator=cpu"]
    assert main(["prune", f"--model.path={out}", *data, *options, f"--output={again}"]) == 0
    assert not (again / "recovery.json").exists(), "it tells of what the recovered model was before"
    assert not (again / "adapter").exists()
    capsys.readouterr()
    assert main(["compare", str(base), str(again)]) == 0
    assert f"| sparsity | {readable_percent(record['folders'][0]['sparsity'])} | 79." in capsys.readouterr().out


def test_what_was_pruned_twice_or_recovered_comes_from_the_same_model(recover, tmp_path, capsys):
    model, data = MODEL, ["--data.source=TensorSource", f"--data.source.path={GOLDEN / 'calib.safetensors'}"]
    options = [*data, "--held_back=0", "--evaluate=false", "--report=false", "--trainer.accelerator=cpu"]
    once, twice, thrice, other, recovered = (tmp_path / name for name in ("1", "2", "3", "other", "recovered"))
    for sparsity, base, out in ((0.4, model, once), (0.6, once, twice), (0.7, twice, thrice), (0.5, model, other)):
        command = ["prune", f"--model.path={base}", f"--pruning.sparsity={sparsity}", *options]
        assert main([*command, f"--output={out}"]) == 0
    assert recover(thrice, recovered, "--trainer.max_epochs=1") == 0
    capsys.readouterr()
    assert main(["compare", *map(str, (once, twice, thrice, other, recovered))]) == 0
    assert "warning" not in capsys.readouterr().out
    first = json.loads((once / "pruning.json").read_text())["model"]["fingerprint"]
    for folder, name in ((thrice, "pruning.json"), (recovered, "recovery.json")):
        record = json.loads((folder / name).read_text())
        assert record["first_fingerprint"] == first
        (folder / name).write_text(json.dumps(record | {"first_fingerprint": "0" * 64}))
        assert main(["compare", str(once), str(folder)]) == 0
        assert "different models" in capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_input_is_one_line(folders, tmp_path, capsys):
    wanda = str(folders / "wanda")
    assert "name two folders" in refused(capsys, wanda)
    assert "nowhere" in refused(capsys, wanda, "nowhere")
    assert "--output" in refused(capsys, wanda, wanda, f"--output={wanda}")
    (tmp_path / "pruning.json").write_text('{"status": "pruning", "linears": {}}')
    assert "not finished" in refused(capsys, wanda, str(tmp_path))
    (tmp_path / "pruning.json").write_text("{")
    assert "is not as a run writes it" in refused(capsys, wanda, str(tmp_path))
    assert not torch.distributed.is_initialized()


LINEAR = {"shape": [8, 8], "achieved": 0.5, "block": 0, "target": 0.5, "pruned": 32}
OTHER_RECORDS = {
    "no Linears": ({"linears": {}}, "does not say which weights"),
    "an empty Linear": ({"linears": {"a.0.b": LINEAR | {"shape": [0, 8]}}}, "does not say which weights"),
    "a Linear that is not there": ({"linears": {"a.0.b": LINEAR}}, "names a.0.b"),
    "a Linear of which little is said": ({"linears": {"a.0.b": {"shape": [8, 8]}}}, "is not as a run writes it"),
    "a fingerprint that is none": ({"model": {"fingerprint": [1]}}, "is not as a run writes it"),
    "data that are none": ({"calibration": {}, "data": {"examined": 5}}, "is not as a run writes it"),
}


@pytest.mark.parametrize(("changed", "problem"), OTHER_RECORDS.values(), ids=OTHER_RECORDS)
def test_a_record_that_somebody_changed_is_one_line(changed, problem, folders, tmp_path, capsys):
    folder = tmp_path / "changed"
    shutil.copytree(folders / "wanda", folder)
    record = json.loads((folder / "pruning.json").read_text())
    (folder / "pruning.json").write_text(json.dumps(record | changed))
    assert problem in refused(capsys, str(folder), str(folder))


def test_a_pipe_for_scores_is_not_waited_for(folders, tmp_path, capsys):
    folder = tmp_path / "piped"
    shutil.copytree(folders / "wanda", folder)
    (folder / "evaluation.json").unlink(missing_ok=True)
    os.mkfifo(folder / "evaluation.json")
    assert "no regular file" in refused(capsys, str(folder), str(folders / "das"))


def test_nothing_is_written_into_a_compared_folder(folders, capsys):
    wanda, das = str(folders / "wanda"), str(folders / "das")
    assert "lies inside" in refused(capsys, wanda, das, f"--output={das}/compared")
    assert not (folders / "das" / "compared").exists()
