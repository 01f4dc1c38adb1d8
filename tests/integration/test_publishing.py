"""A finished folder on its way to the hub: checked before the run, nothing private in it, one line where it fails."""

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from lvlm_prune.cli import main
from lvlm_prune.clock import command_began
from lvlm_prune.output.base_record import record_of
from lvlm_prune.output.private import without_private
from lvlm_prune.runs import publishing
from lvlm_prune.runs.evaluate import run as evaluating
from tests.conftest import GOLDEN, MODEL
from tests.hub_folders import write_captions, write_folder
from tests.pages import Page


class Hub:
    """Stands in for the hub: who is logged in, and what was uploaded."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: list[str] = []
        self.failure: Exception | None = None

    def whoami(self) -> dict[str, Any]:
        return {"name": "me", "orgs": [{"name": "ours"}]}

    def create_repo(self, repo_id: str, exist_ok: bool) -> str:
        assert exist_ok
        self.repositories.append(repo_id)
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.failure is not None:
            raise self.failure
        found = (path for path in folder_path.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def own(tmp_path: Path) -> tuple[list[str], Path]:
    return on_own_samples(tmp_path)


def on_own_samples(tmp_path: Path) -> tuple[list[str], Path]:
    """A command on calibration samples in a place that nobody is to read of, and its output folder."""
    place = tmp_path / "patients-of-2026"
    place.mkdir()
    (place / "calibration.safetensors").write_bytes((GOLDEN / "calib.safetensors").read_bytes())
    out = tmp_path / "out"
    source = ["--data.source=TensorSource", f"--data.source.path={place / 'calibration.safetensors'}"]
    small = ["--data.num_samples=4", "--trainer.accelerator=cpu", f"--output={out}"]
    return ["prune", f"--model.path={MODEL}", *source, *small], out


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[list[str], Path]:
    """Such a command, and the folder that it has written, with its page; tests leave it as it is."""
    command, out = on_own_samples(tmp_path_factory.mktemp("finished"))
    assert main(command) == 0
    return command, out


def texts(files: dict[str, bytes]) -> str:
    return "\n".join(content.decode() for name, content in files.items() if not name.endswith((".safetensors", ".png")))


def test_what_is_pushed_is_the_folder_without_what_is_private(own, hub, tmp_path, capsys, blank_figures):
    command, out = own
    assert main([*command, "--push=ours/sparse"]) == 0
    assert hub.repositories == ["ours/sparse"]
    assert "pushed" in capsys.readouterr().out
    assert hub.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert {"config.json", "README.md", "pruning.json", "config.yaml", "report.html"} <= hub.files.keys()
    assert "patients" not in texts(hub.files)
    assert str(tmp_path) not in texts(hub.files)
    assert "left out of all files here" in ModelCard(hub.files["README.md"].decode()).text
    kept, pushed = json.loads((out / "pruning.json").read_text()), json.loads(hub.files["pruning.json"])
    assert pushed["linears"] == kept["linears"]
    # What is left out lies beside it: the dense model is found there.
    beside = tmp_path / "out.private"
    assert "patients" in (beside / "pruning.json").read_text()
    assert "patients" in yaml.safe_load((beside / "config.yaml").read_text())["data"]["source"]["init_args"]["path"]
    hub.files = {}
    assert main([*command, "--push=ours/sparse", "--resume=true"]) == 0
    assert "patients" not in texts(hub.files)
    assert hub.files


def test_by_itself_a_folder_holds_nothing_private_and_is_still_resumed_and_packed(finished, tmp_path, capsys):
    command, out = finished
    place = out.parent

    def written(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = written(out)
    assert "patients" not in texts(before)
    assert str(place) not in texts(before)
    assert not (out / "report" / "calibration-image.png").exists()
    beside = written(place / "out.private")
    assert {"pruning.json", "config.yaml", "report.html"} <= beside.keys()
    assert record_of(out)["dense"]["path"] == str(MODEL)
    assert main([*command, "--resume=true"]) == 0
    assert written(place / "out.private") == beside
    after = written(out)
    assert "patients" not in texts(after)
    assert after["model.safetensors"] == before["model.safetensors"]
    # The page gives what is left out as the reason, and asks for what repeating the run needs.
    page, whole = (
        re.sub("</?span>", "", (folder / "report.html").read_text()) for folder in (out, place / "out.private")
    )
    assert "Not drawn: pictures of samples are left out of this page." in page
    assert "--output NEW_FOLDER --model.path ... --data.source.path ..." in page
    assert "--output NEW_FOLDER</pre>" in whole
    capsys.readouterr()
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    assert main(["pack", f"--model.path={out}", f"--output={packed}"]) == 0
    assert str(place) not in texts(written(packed))
    assert str(tmp_path) not in texts(written(packed))
    # What is said to lie beside it does, and the dense model is found from there.
    assert f"are in {packed}.private" in capsys.readouterr().out.splitlines()[-1]
    assert str(out) in (tmp_path / "packed.private" / "packing.json").read_text()
    private = texts(written(tmp_path / "packed.private"))
    assert main(["pack", f"--model.path={out}", f"--output={packed}", "--resume=true"]) == 0
    assert texts(written(tmp_path / "packed.private")) == private
    assert record_of(packed)["dense"]["path"] == str(MODEL)
    assert main(["unpack", f"--model.path={packed}", f"--output={unpacked}"]) == 0
    assert f"are in {unpacked}.private" in capsys.readouterr().out.splitlines()[-1]
    assert record_of(unpacked)["dense"]["path"] == str(MODEL)


def test_scores_come_to_the_private_page_too_and_to_the_other_one_without_paths(tmp_path, monkeypatch, blank_figures):
    write_folder(tmp_path / "dense", "llava")
    photos = write_captions(tmp_path / "patients", 4)
    source = ["--data.source=LlavaJsonSource", f"--data.source.path={photos}", "--data.num_samples=2"]
    out = tmp_path / "out"
    assert main(["prune", f"--model.path={tmp_path / 'dense'}", *source, f"--output={out}"]) == 0
    name = "--engine.benchmark.source"
    asked = ["--engine.benchmark=LocalBenchmark", f"{name}=LlavaJsonSource", f"{name}.path={photos}"]
    drawn: list[float] = []
    monkeypatch.setattr(evaluating, "refresh_card", lambda _: not drawn.append(time.perf_counter() - command_began()))
    assert main(["evaluate", f"--model.path={out}", *asked]) == 0
    taken = json.loads((out / "evaluation.json").read_text())["seconds"]
    assert taken >= drawn[0] > 0, "pages count, for which its user waits"
    beside = tmp_path / "out.private"
    for folder, is_private in ((out, False), (beside, True)):
        page = (folder / "report.html").read_text()
        assert "average score, evaluated" in re.sub("<[^>]*>", "", page)
        assert ('id="tokens"' in page) == is_private, "the picture of a sample, as before"
        assert ("patients" in (folder / "evaluation.json").read_text()) == is_private


@pytest.mark.parametrize("publishable", ["true", "false"])
def test_a_task_that_has_its_name_from_a_file_is_called_otherwise_where_it_is_published(
    publishable, tmp_path, hub, blank_figures
):
    write_folder(tmp_path / "dense", "llava")
    photos = write_captions(tmp_path / "photos", 4)
    questions = photos.rename(photos.with_name("patients-of-2026.json"))
    out, name = tmp_path / "out", "--engine.benchmark.source"
    prune = ["prune", f"--model.path={tmp_path / 'dense'}", "--method=magnitude", "--evaluate=false"]
    prune += [f"--publishable={publishable}", f"--output={out}"]
    assert main(prune) == 0
    asked = ["--engine.benchmark=LocalBenchmark", f"{name}=LlavaJsonSource", f"{name}.path={questions}"]
    assert main(["evaluate", f"--model.path={out}", *asked]) == 0
    kept = out if publishable == "false" else tmp_path / "out.private"
    tasks = {folder: json.loads((folder / "evaluation.json").read_text())["tasks"] for folder in {out, kept}}
    assert [*tasks[kept]] == ["patients-of-2026"]
    assert main([*prune, "--resume=true", "--push=me/sparse"]) == 0
    assert "patients" not in texts(hub.files)
    written = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert ("patients" in texts(written)) == (publishable == "false")
    for name in ("evaluation.md", "README.md", "report.html"):
        assert "own questions" in re.sub("</?span>", "", hub.files[name].decode()), name


@pytest.fixture(params=["folder", "file", "link"])
def in_the_way(request, tmp_path: Path) -> Path:
    """Something of somebody else's where the private part of an output goes."""
    beside = tmp_path / "out.private"
    if request.param == "folder":
        (beside / "report").mkdir(parents=True)
        (beside / "report" / "thesis.txt").write_text("years of work")
    elif request.param == "file":
        beside.write_text("years of work")
    else:
        beside.symlink_to(tmp_path / "nowhere")
    return beside


def test_what_somebody_else_has_where_the_private_part_goes_is_left_alone(own, in_the_way, tmp_path, capsys):
    command, out = own

    def found() -> dict[Path, tuple[int, int]]:
        return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in (in_the_way, *in_the_way.rglob("*"))}

    before = found()
    for asked in (command, ["pack", f"--model.path={MODEL}", f"--output={out}"]):
        assert main(asked) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --output {out}: ")
        assert f"{in_the_way}, which no run wrote" in line
        assert not out.exists()
    assert found() == before


QUICK = ["--method=magnitude", "--report=false", "--held_back=0", "--pruning.sparsity=0.6", "--evaluate=false"]


def test_what_somebody_else_has_is_in_the_way_of_nothing_where_nothing_private_is_written(own, in_the_way):
    command, out = own
    assert main([*command, *QUICK, "--publishable=false"]) == 0
    assert in_the_way.is_symlink() or in_the_way.exists()
    assert out.is_dir()


def test_what_somebody_else_has_is_not_in_the_way_of_packing_or_of_the_embedded_model(own, tmp_path, blank_figures):
    command, out = own
    assert main([*command, *QUICK, "--publishable=false"]) == 0
    packed, embedded = tmp_path / "packed" / "out", tmp_path / "embedded" / "out"
    for folder in (packed, embedded):
        folder.parent.mkdir()
        (folder.parent / "out.private").write_text("years of work")
    assert main(["pack", f"--model.path={out}", f"--output={packed}", "--publishable=false"]) == 0
    assert main(["prune", *QUICK, "--model.path=demo", f"--output={embedded}"]) == 0
    shutil.rmtree(embedded)
    data = ["--model.path=demo", "--data.num_samples=2", "--evaluate=false"]
    small = ["--probing.sparsities=[0.5]", "--probing.pathways=[text]", "--probing.pools=[text]"]
    small += ["--probing.map_tokens=0", "--probing.curve_samples=0"]
    assert main(["probe", *data, *small, f"--output={embedded}"]) == 0
    assert (packed.parent / "out.private").read_text() == (embedded.parent / "out.private").read_text()


def test_notes_beside_private_records_stay_when_a_run_is_repeated(own, tmp_path):
    command, out = own
    command = [*command, "--report=false", "--held_back=0", "--method=magnitude"]
    assert main(command) == 0
    notes = tmp_path / "out.private" / "notes.txt"
    notes.write_text("seed 3 is the one")
    (tmp_path / "out.private" / "report.html").write_text("of an earlier run")
    shutil.rmtree(out)
    assert main(command) == 0
    assert notes.read_text() == "seed 3 is the one"
    assert not (tmp_path / "out.private" / "report.html").exists()


def test_a_relative_path_leads_to_the_dense_model_from_everywhere(own, tmp_path, monkeypatch):
    command, out = own
    monkeypatch.chdir(MODEL.parent)
    relative = [argument if "model.path" not in argument else "--model.path=model" for argument in command]
    assert main([*relative, "--report=false", "--held_back=0", "--method=magnitude"]) == 0
    assert record_of(out)["dense"]["folder"] == str(MODEL)
    assert str(MODEL.parent) not in (out / "pruning.json").read_text()


def test_a_folder_that_is_kept_to_oneself_holds_everything(own, tmp_path):
    command, out = own
    assert main([*command, "--publishable=false", "--report=false"]) == 0
    assert "patients" in (out / "pruning.json").read_text()
    assert "--publishable true" in (out / "README.md").read_text()
    assert not (tmp_path / "out.private").exists()


@pytest.mark.parametrize(
    ("repository", "token", "failure", "said"),
    [
        ("sparse", "hf", None, "is written owner/name"),
        ("me/sparse", None, None, "hf auth login"),
        ("stranger/sparse", "hf", None, "no member of stranger"),
        ("me/sparse", "hf", OSError("no route to host"), "cannot be reached"),
    ],
)
def test_what_cannot_be_pushed_to_is_one_line_before_the_run(
    repository, token, failure, said, own, hub, monkeypatch, capsys
):
    command, out = own

    def whoami() -> dict[str, Any]:
        if failure is not None:
            raise failure
        return {"name": "me", "orgs": []}

    monkeypatch.setattr(hub, "whoami", whoami)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    assert main([*command, f"--push={repository}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --push {repository}: ")
    assert said in line
    assert not out.exists()


def test_a_failed_upload_leaves_a_complete_folder(own, hub, capsys):
    command, out = own
    answer: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    hub.failure = HfHubHTTPError("Forbidden", response=answer)
    assert main([*command, "--push=me/sparse", "--report=false"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--resume true pushes it" in line
    assert json.loads((out / "pruning.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("full", ["folder", "temporary"])
def test_a_full_disk_while_publishing_is_one_line_and_can_be_gone_on_with(full, own, hub, monkeypatch, capsys):
    command, out = own

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if full == "folder":
            patched.setattr(publishing, "leave_out_private", no_room)
        else:
            patched.setattr(publishing, "_link", no_room)
        status = main([*command, "--push=me/sparse", "--report=false"])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert "No space left on device" in line
    assert "with --resume true" in line
    assert not hub.files
    assert main([*command, "--push=me/sparse", "--report=false", "--resume=true"]) == 0
    assert "config.json" in hub.files
    assert "patients" not in (out / "pruning.json").read_text()


def test_where_the_model_lay_that_was_pruned_is_private_as_a_relative_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patients" / "llava").mkdir(parents=True)
    for place in ("patients/llava", str(tmp_path / "patients" / "llava"), "./patients/llava"):
        assert without_private({"origin": place})["origin"] == "(left out)"
    assert without_private({"origin": "owner/llava"})["origin"] == "owner/llava"


def test_figures_without_private_data_are_those_that_were_drawn(finished):
    """They are not drawn anew; the picture of a sample is on the page beside the folder only."""
    _, out = finished
    beside = out.with_name("out.private")
    pages = [Page((folder / "report.html").read_text()) for folder in (out, beside)]
    assert [figure for figure in pages[1].figures if figure != "tokens"] == pages[0].figures
    assert "tokens" in pages[1].figures
    for name in pages[0].figures:
        assert (out / "report" / f"{name}.png").read_bytes() == (beside / "report" / f"{name}.png").read_bytes()
    assert not (out / "report" / "tokens.png").exists()


def test_a_log_in_the_folder_holds_nothing_private_and_is_not_passed_on(own, tmp_path):
    command, out = own
    quick = ["--report=false", "--held_back=0"]
    assert main([*command, *quick, "--trainer.logger=CSVLogger"]) == 0
    assert (out / "lightning_logs" / "version_0" / "hparams.yaml").is_file()
    for path in out.rglob("*"):
        assert not path.is_file() or b"patients-of-2026" not in path.read_bytes(), path
    packed, again = tmp_path / "packed", tmp_path / "again"
    assert main(["pack", f"--model.path={out}", f"--output={packed}"]) == 0
    assert main(["prune", f"--config={out / 'config.yaml'}", *quick, f"--output={again}"]) == 0
    assert not (packed / "lightning_logs").exists()
    assert (again / "lightning_logs" / "version_0").is_dir(), "the run that repeats it logs into its own folder"
    assert [path.name for path in (out / "lightning_logs").iterdir()] == ["version_0"]
