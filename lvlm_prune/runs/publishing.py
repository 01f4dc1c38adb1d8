"""Publishing a finished folder: what is private is left out, and the rest goes to the hub.

                      what is private lies beside the folder, in FOLDER.private; of embedded model and data only local
                      paths would, which are left out
--publishable false   the folder itself holds it
--push owner/name     a copy without private data goes to the hub
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lvlm_prune.checkpoints.files import files_within
from lvlm_prune.checkpoints.hub import hub_name
from lvlm_prune.distributed.ranks import is_first_process
from lvlm_prune.errors import InputError, RunError, first_line
from lvlm_prune.evaluation.record import read_record, write_record
from lvlm_prune.output.folder import writing
from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.names import (
    EVALUATION_TABLE,
    FIGURE_FOLDER,
    LOG_FOLDER,
    PAGE_NAME,
    PICTURE_FIGURE,
    PICTURE_NAME,
    PRUNING_RECORD,
    RECOVERY_RECORD,
)
from lvlm_prune.output.private import (
    CONFIG_HEAD,
    RECORDS,
    has_private,
    is_left_out,
    keeps_private,
    private_folder,
    without_places,
    without_private,
)
from lvlm_prune.output.reading import load_yaml
from lvlm_prune.output.summaries import private_line
from lvlm_prune.output.temporary import temporary_folder
from lvlm_prune.report.card_checks import card_follows
from lvlm_prune.report.refreshing import refresh_page

_NOT_LOGGED_IN = "nobody is logged in: run `hf auth login` with a token that may write, or set HF_TOKEN"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ADAPTER_CONFIG = "adapter/adapter_config.json"


class Publication:
    """What a command was asked to do with its folder once that is finished; checked before anything is done.

    Args:
        push: Repository on the hub, `owner/name`; empty: nothing is uploaded.
        publishable: Whether the folder itself is to hold nothing private; None: unless nothing about it is.

    Raises:
        InputError: There is no such repository to write to: the name is none, nobody is logged in, the hub cannot be
            reached, or the owner is somebody else.
    """

    def __init__(self, push: str = "", publishable: bool | None = None) -> None:
        self.push, self.publishable = push, publishable
        if push and is_first_process():
            _refuse_unreachable(push)

    def __call__(self, folder: Path | None, quiet: bool = False) -> None:
        """Do it, on the first process.

        Args:
            folder: The finished folder; None where the run wrote none.
            quiet: Whether nothing is printed.

        Raises:
            RunError: The upload failed.
        """
        if folder is not None and is_first_process():
            self.put_aside(folder, quiet)
            self.upload(folder, quiet)

    def put_aside(self, folder: Path, quiet: bool = False) -> None:
        """Take what is private out of a finished folder, if it is to hold nothing private; see `__call__`."""
        if self.publishable is False or not any((folder / name).is_file() for name in RECORDS):
            return
        if not keeps_own_private(folder, self.publishable):
            with writing(folder), card_follows(folder):
                _leave_out_of_records(folder, without_places)
            return
        with writing(private_folder(folder)):
            keep_private(folder)
        with writing(folder):
            leave_out_private(folder)
        if not quiet and private_folder(folder).is_dir():
            print(private_line(folder), flush=True)

    def upload(self, folder: Path, quiet: bool = False) -> None:
        """Upload a finished folder without what is private, if it is to be; see `__call__`."""
        if self.push:
            with published(folder) as copy:
                address = _upload(copy, folder, self.push)
            if not quiet:
                print(f"pushed {folder} to {address}, without local paths, ids and pictures of samples", flush=True)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """While the context is open: a folder with what of `folder` may be published; weights are links to its own."""
    with temporary_folder(way_on=f"{folder} is complete; the same command with --resume true pushes it") as place:
        copy = place / "model"
        for relative in files_within(folder):
            if relative.parts[0] == LOG_FOLDER:
                continue
            (copy / relative).parent.mkdir(parents=True, exist_ok=True)
            if relative.suffix == ".safetensors":
                _link(folder / relative, copy / relative)
            else:
                shutil.copyfile(folder / relative, copy / relative)
        leave_out_private(copy)
        yield copy


def keep_private(folder: Path) -> None:
    """Copy what is private beside a finished folder, in place of what an earlier run left there.

    Where a run's record has nothing private any more, what it had lies there already: the run was complete before, or
    its folder was packed. Then only records that are new are added.
    """
    beside = private_folder(folder)
    whole = [name for name in RECORDS if (folder / name).is_file() and not is_left_out(_read(folder / name))]
    if not whole:
        return
    beside.mkdir(exist_ok=True)
    if any(is_left_out(_read(folder / name)) for name in (PRUNING_RECORD, RECOVERY_RECORD)):
        for name in whole:
            replace_durably(beside / name, (folder / name).read_bytes())
        return
    _copy_private(folder, beside)


def carry_private(source: Path, folder: Path, quiet: bool = True) -> None:
    """Give a folder that was packed or unpacked what lies beside the one it was made from, where anything does.

    Where it lies there already, what came to it since stays.

    Args:
        source: What was packed or unpacked.
        folder: What was made from it.
        quiet: Whether nothing is said of it.
    """
    origin, beside = private_folder(source), private_folder(folder)
    if has_private(source):
        with writing(beside):
            beside.mkdir(exist_ok=True)
            _copy_private(origin, beside, only_missing=_is_of_same_run(origin, beside))
        if not quiet:
            print(private_line(folder), flush=True)


def _is_of_same_run(origin: Path, beside: Path) -> bool:
    records = [name for name in (PRUNING_RECORD, RECOVERY_RECORD) if (origin / name).is_file()]
    return bool(records) and all(
        (beside / name).is_file() and (beside / name).read_bytes() == (origin / name).read_bytes() for name in records
    )


def _copy_private(source: Path, beside: Path, only_missing: bool = False) -> None:
    """Put the private files of a folder in place of earlier ones; one record at least is there at any time.

    The records of the run come last of the records, and the page last of all: by them an interrupted copy is known.
    """
    others = ("config.yaml", _ADAPTER_CONFIG)
    if not only_missing:
        for name in (*others, PAGE_NAME):
            (beside / name).unlink(missing_ok=True)
        shutil.rmtree(beside / FIGURE_FOLDER, ignore_errors=True)
        for name in sorted(RECORDS, key=lambda name: (not (source / name).is_file(), -RECORDS.index(name))):
            if (source / name).is_file():
                replace_durably(beside / name, (source / name).read_bytes())
            else:
                (beside / name).unlink(missing_ok=True)
    if (source / FIGURE_FOLDER).is_dir() and not (beside / PAGE_NAME).is_file():
        shutil.copytree(source / FIGURE_FOLDER, beside / FIGURE_FOLDER, dirs_exist_ok=True)
    for name in (*others, PAGE_NAME):
        if (source / name).is_file() and not (beside / name).is_file():
            (beside / name).parent.mkdir(exist_ok=True)
            replace_durably(beside / name, (source / name).read_bytes())


def keeps_own_private(folder: Path, publishable: bool | None) -> bool:
    """Whether what is private of a checkpoint goes beside it: by its records, unless its user said so.

    Args:
        folder: The checkpoint.
        publishable: As its user said.
    """
    told = [_read(folder / name) for name in (PRUNING_RECORD, RECOVERY_RECORD) if (folder / name).is_file()]
    return any(keeps_private(publishable, record) for record in told or [{}])


def _read(path: Path) -> dict[str, Any]:
    return _object(path, json.loads) if path.is_file() else {}


def _object(path: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    """What a file of a finished folder holds, which somebody may have changed since."""
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise InputError("output", path.parent, f"its {path.name} is not as a run writes it")
    return content


def leave_out_private(folder: Path) -> None:
    """Take what is private out of a finished folder: paths, ids and the picture of a sample; a second time nothing."""
    with card_follows(folder):
        _leave_out_of_records(folder, without_private, CONFIG_HEAD)
        for name in (PICTURE_NAME, f"{PICTURE_FIGURE}.png"):
            (folder / FIGURE_FOLDER / name).unlink(missing_ok=True)
        if not refresh_page(folder, same_numbers=True):
            (folder / PAGE_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder / FIGURE_FOLDER, ignore_errors=True)


def _leave_out_of_records(
    folder: Path, public: Callable[[Mapping[str, Any]], dict[str, Any]], config_head: str = ""
) -> None:
    """Take what is private out of records and configurations.

    Args:
        folder: The finished folder.
        public: What is left of a record, or of a configuration.
        config_head: First line of `config.yaml`.
    """
    if (folder / _ADAPTER_CONFIG).is_file():
        adapter = _read(folder / _ADAPTER_CONFIG)
        base = adapter.get("base_model_name_or_path") or ""
        adapter["base_model_name_or_path"] = hub_name(base) or Path(base).name or None
        replace_durably(folder / _ADAPTER_CONFIG, json.dumps(adapter, indent=2, sort_keys=True).encode())
    for name in RECORDS:
        if (folder / name).is_file():
            record = public(_read(folder / name))
            replace_durably(folder / name, (json.dumps(record, indent=1) + "\n").encode())
    if (folder / EVALUATION_TABLE).is_file():  # tasks may have other names now
        if (evaluated := read_record(folder)) is None:
            (folder / EVALUATION_TABLE).unlink()
        else:
            write_record(folder, evaluated)
    if (folder / "config.yaml").is_file():
        config = public(_object(folder / "config.yaml", lambda text: load_yaml(text) or {}))
        del config["private_data"]
        replace_durably(folder / "config.yaml", (config_head + yaml.safe_dump(config, sort_keys=False)).encode())


def _link(target: Path, link: Path) -> None:
    try:
        link.symlink_to(target.resolve())
    except OSError:  # Windows, without the right to make links
        shutil.copyfile(target, link)


def _refuse_unreachable(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise InputError("push", repository, "a repository on the hub is written owner/name")
    who = _asked(repository, lambda api: api.whoami())
    owners = [who.get("name"), *(one.get("name") for one in who.get("orgs", []))]
    owner = repository.split("/")[0]
    if owner not in owners:
        raise InputError("push", repository, f"you are {owners[0]} on the hub, and no member of {owner}")


def _upload(copy: Path, folder: Path, repository: str) -> str:
    import lvlm_prune

    def work(api: Any) -> str:
        address = str(api.create_repo(repository, exist_ok=True))
        message = f"Upload by lvlm-prune {lvlm_prune.__version__}"
        api.upload_folder(repo_id=repository, folder_path=copy, commit_message=message)
        return address

    try:
        return str(_asked(repository, work))
    except InputError as error:
        raise RunError(f"{error} ({folder} is complete; the same command with --resume true pushes it)") from None


def _asked(repository: str, question: Any) -> Any:
    """What the hub answers.

    Raises:
        InputError: It does not; says why, and what to do.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError("push", repository, "HF_HUB_OFFLINE is set, so nothing can be uploaded")
    if huggingface_hub.get_token() is None:
        raise InputError("push", repository, _NOT_LOGGED_IN)
    try:
        return question(huggingface_hub.HfApi())
    except LocalTokenNotFoundError:
        problem = _NOT_LOGGED_IN
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        refused = "the hub refuses the token; run `hf auth login` with one that may write there"
        problem = refused if status in (401, 403) else f"the hub answers: {first_line(error)}"
    except (OfflineModeIsEnabled, OSError) as error:
        problem = f"the hub cannot be reached ({first_line(error)})"
    except Exception as error:  # of the library that speaks HTTP, which is another one in each version
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "huggingface_hub")):
            raise
        problem = f"the hub cannot be reached ({first_line(error)})"
    raise InputError("push", repository, problem)
