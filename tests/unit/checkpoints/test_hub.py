from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from lvlm_prune.checkpoints import resolve
from lvlm_prune.errors import InputError

# What the errors of the hub ask of the answer that they carry.
ANSWER: Any = SimpleNamespace(headers={}, request=None)


def test_a_folder_stands_for_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, dict[str, Any]] = {}

    def download(hub_id: str, **options: Any) -> str:
        calls[hub_id] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", revision="v2") == tmp_path
    assert calls["owner/name"]["revision"] == "v2"
    assert not any("bin" in str(pattern) for pattern in calls["owner/name"]["allow_patterns"])


@pytest.mark.parametrize("path", ["nonesuch", "./owner/name", "/nonesuch/folder", "a/b/c", ""])
def test_what_can_only_be_a_folder_never_asks_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"model\.path.*no such folder"):
        resolve(path)


@pytest.mark.parametrize(
    ("error", "option", "problem"),
    [
        (RepositoryNotFoundError("404", response=ANSWER), "model.path", "no such model on the hub"),
        (RevisionNotFoundError("404", response=ANSWER), "model.revision", "no such revision"),
        (LocalEntryNotFoundError("offline"), "model.path", "cannot be reached"),
        (ConnectionError("no route"), "model.path", "no route"),
    ],
)
def test_a_failed_download_is_one_line(
    error: Exception, option: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=problem) as caught:
        resolve("owner/name")
    assert caught.value.option == option


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.revision"):
        resolve(tmp_path, revision="v2")
