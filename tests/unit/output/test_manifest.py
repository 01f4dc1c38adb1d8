"""The manifest survives a crash and refuses to be continued by another run."""

import pytest

from lvlm_prune.errors import InputError
from lvlm_prune.output.manifest import Manifest, replace_durably
from lvlm_prune.output.names import PRUNING_RECORD


@pytest.fixture
def written(tmp_path):
    config = {"pruning": {"sparsity": 0.5, "pool": {"init_args": {"alpha": 1.0}}}, "trainer": {"devices": 1}}
    manifest = Manifest(
        status="pruning", config=config, model={"fingerprint": "a"}, calibration={"seed": 0}, blocks=[{"index": 0}]
    )
    manifest["versions"] = {"lvlm_prune": "0.1", "torch": "2.8"}
    manifest.write(tmp_path)
    return manifest, tmp_path


def test_what_is_written_is_read(written):
    manifest, folder = written
    assert Manifest.read(folder) == manifest
    assert Manifest.read(folder).finished_blocks() == [0]
    assert [path.name for path in folder.iterdir()] == [PRUNING_RECORD]


def test_line_breaks_are_for_readers_of_a_finished_run(written):
    """To put them in takes longer than all else of a write, and there is one at each block."""
    manifest, folder = written
    assert len((folder / PRUNING_RECORD).read_text().splitlines()) == 1
    manifest["status"] = "complete"
    manifest.write(folder)
    assert len((folder / PRUNING_RECORD).read_text().splitlines()) > 10


def test_the_same_run_may_go_on_with_other_devices(written):
    manifest, folder = written
    same = Manifest(manifest | {"config": manifest["config"] | {"trainer": {"devices": 8}, "resume": True}})
    manifest.refuse_other(same, folder)


@pytest.mark.parametrize(
    ("section", "changed", "named"),
    [
        (
            "config",
            {"pruning": {"sparsity": 0.5, "pool": {"init_args": {"alpha": 2.0}}}},
            "pruning.pool.init_args.alpha",
        ),
        ("config", {"pruning": {"sparsity": 0.5}}, "pruning.pool.init_args.alpha"),
        ("model", {"fingerprint": "b"}, "model.path .*: has changed"),
        ("calibration", {"fingerprint": "b"}, "data.source .*: gives other calibration samples"),
        ("calibration", {"seed": 1}, "calibration.seed"),
        ("calibration", {}, "is not as a run writes it"),
        ("asked", {"engine": "BuiltinEngine", "fingerprint": "b"}, "--engine BuiltinEngine: asks other questions now"),
        ("versions", {"lvlm_prune": "0.2"}, "is the unfinished run of lvlm-prune 0.1, and this is 0.2"),
    ],
)
def test_another_run_is_refused_with_the_first_difference(written, section, changed, named):
    manifest, folder = written
    with pytest.raises(InputError, match=named):
        manifest.refuse_other(Manifest(manifest | {section: changed}), folder)


def test_questions_that_an_older_version_noted_are_not_said_to_be_others(written):
    manifest, folder = written
    noted, now = ({"engine": "BuiltinEngine", "fingerprint": text} for text in ("9a0f", "content:9a0f"))
    with pytest.raises(InputError, match=r"an older version wrote .*, and noted names of pictures, not what is in"):
        Manifest(manifest | {"asked": noted}).refuse_other(Manifest(manifest | {"asked": now}), folder)


def test_a_folder_without_a_readable_manifest_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a folder that"):
        Manifest.read(tmp_path)
    (tmp_path / PRUNING_RECORD).write_text('{"status": "pru')
    with pytest.raises(InputError, match="is not as a run writes it"):
        Manifest.read(tmp_path)


def test_a_crash_while_writing_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_durably(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        replace_durably(path, b"new")
    assert path.read_bytes() == b"old"
