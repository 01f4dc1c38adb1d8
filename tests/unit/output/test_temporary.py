"""Files that nobody keeps: where they cannot be written, that is one line."""

import errno
import os
import tempfile

import pytest

from lvlm_prune.errors import RunError
from lvlm_prune.output.temporary import temporary_folder


def test_a_full_place_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fill() -> None:
        with temporary_folder(way_on="begin again") as folder:
            (folder / "a").write_text("x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"cannot be written in .*No space left on device.*TMPDIR") as error:
        fill()
    assert str(error.value).endswith("(begin again)")
    assert not list(tmp_path.iterdir())


def test_no_place_at_all_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match=r"temporary files cannot be written"), temporary_folder():
        pass


def test_what_else_goes_wrong_meanwhile_is_said_as_it_is():
    with pytest.raises(FileNotFoundError), temporary_folder() as folder:
        (folder / "missing").read_text()
