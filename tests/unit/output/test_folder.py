"""Output folders that cannot be are refused in one line before anything is done."""

import os
import shutil
from pathlib import Path

import pytest

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.checkpoints.headers import read_header
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.output.folder import choose_folder, refuse_other_content, refuse_shared_files, refuse_unusable
from lvlm_prune.output.names import PRIVATE_SUFFIX, PRUNING_RECORD
from tests.conftest import MODEL


def under_a_file(place: Path) -> Path:
    (place / "file").write_text("")
    return place / "file" / "out" / "deeper"


def in_a_circle(place: Path) -> Path:
    (place / "circle").symlink_to(place / "circle")
    return place / "circle" / "out"


def link_to_nothing(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere")
    return place / "link"


def closed(place: Path) -> Path:
    (place / "closed").mkdir(mode=0)
    return place / "closed" / "out" / "deeper"


IMPOSSIBLE = {
    "under a file": (under_a_file, "which is a file"),
    "in a circle": (in_a_circle, "circle of links|Too many levels"),
    "link to nothing": (link_to_nothing, "does not exist"),
    "longer with its private part": (lambda place: place / ("x" * (256 - len(PRIVATE_SUFFIX))), "too long"),
    "the root": (lambda place: Path("/"), "is the root of the file system"),
    "above the root": (lambda place: Path("/.."), "is the root of the file system"),
    "closed": (closed, "Permission denied"),
}


@pytest.mark.parametrize(("made", "problem"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_folder_that_cannot_be_is_refused_by_every_command(made, problem, tmp_path):
    if made is closed and os.geteuid() == 0:
        pytest.skip("root may look everywhere")
    folder = made(tmp_path)
    with pytest.raises(InputError, match=problem):
        refuse_unusable(choose_folder(str(folder), "name", resume=False), None, PRUNING_RECORD, resume=False)
    with pytest.raises(InputError, match=problem):
        refuse_other_content(folder, ["*.jsonl"], "sweep")


@pytest.mark.parametrize("kind", ["prune", "pack"])
def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(kind, tmp_path):
    """Whether a run goes on with a copy of the layout (`prune`), or reads the header again (`pack`, `unpack`)."""
    source, folder = CheckpointFolder(MODEL), tmp_path / "out"
    shutil.copytree(source.path, folder)
    twin = source.at(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors is no regular file"):
        refuse_shared_files(folder, source)
    with pytest.raises((RunError, ValueError), match="is no regular file"):
        twin.read(next(iter(twin))) if kind == "prune" else read_header(folder / "model.safetensors")


def test_a_command_adds_only_to_what_it_wrote(tmp_path):
    refuse_other_content(tmp_path / "new", ["*.jsonl"], "sweep")
    refuse_other_content(tmp_path, ["*.jsonl"], "sweep")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds no sweep"):
        refuse_other_content(tmp_path, ["*.jsonl"], "sweep")
    (tmp_path / "sweep.jsonl").write_text("")
    refuse_other_content(tmp_path, ["*.jsonl"], "sweep")
