"""The folder that a run writes: refused before anything is done, filled with a copy of the input, released at the end.

Until the run is complete and verified `config.json` is held back, so that nobody can load an unfinished checkpoint.
"""

import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.checkpoints.files import files_within, refuse_undecodable
from lvlm_prune.checkpoints.unfinished import HELD_BACK
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.output.manifest import read_run, replace_durably, sync_file, sync_folder
from lvlm_prune.output.names import LOG_FOLDER, MODEL_CARD, RUN_FILES
from lvlm_prune.output.own_files import record_of
from lvlm_prune.output.private import private_folder, refuse_foreign
from lvlm_prune.output.records import FileRecord
from lvlm_prune.output.units import readable_size

_NAMED = 12  # files that are left out, in one line
_OF_COMMAND: ContextVar[str] = ContextVar("_OF_COMMAND", default="")


def choose_folder(output: str, name: str, resume: bool) -> Path:
    """The folder that a run writes: the one asked for, or a new one under `runs`.

    Args:
        output: What the user asked for; empty for none.
        name: Name of the new folder; numbered where it is taken.
        resume: Whether an unfinished run goes on, which only the user can point at.

    Raises:
        InputError: An unfinished run is to go on, and nobody says where; or what was asked for is no folder and cannot
            become one.
    """
    if output:
        _refuse_no_folder(folder := named_folder(output))
        return folder
    if resume:
        raise InputError("resume", "true", "needs --output, the folder of the unfinished run")
    wanted = Path("runs") / name
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def named_folder(output: str) -> Path:
    """The folder that a user names. The way back out of a folder (`new/../out`) leads out of a missing one, too.

    Args:
        output: Its name.

    Raises:
        InputError: It is no text.
    """
    folder = Path(output)
    refuse_undecodable(folder, "output")
    if any(inner == ".." != outer for outer, inner in pairwise(folder.parts)):
        with suppress(OSError, RuntimeError):  # said where it is looked at
            found = folder.resolve()
            return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found
    return folder


def refuse_unusable(
    folder: Path,
    source: CheckpointFolder | None,
    record: str,
    resume: bool,
    copies: bool = True,
    scratch: str = "",
    private: bool = True,
) -> None:
    """Refuse an output folder that cannot be written.

    Args:
        folder: The output folder, which need not exist.
        source: The input checkpoint; None for a model in memory.
        record: Name of the manifest that an unfinished run of the same kind left.
        resume: Whether such a run goes on.
        copies: Whether a copy of the input is going to be written, which needs room.
        scratch: A folder in it of links to the input, which is removed and made anew.
        private: Whether the private part of the folder may be written.

    Raises:
        InputError: The folder exists and is not empty, lies in the input, shares files with it or with another
            checkpoint, cannot be written or has no room; a link leads out of the input; or something that no run wrote
            lies where its private part goes.
    """
    _refuse_no_folder(folder)
    if source is not None:
        refuse_overlap(folder, source.path)
    occupied = is_occupied(folder, record)
    if occupied and not resume:
        left = read_run(folder / record) or {}
        way_out = "go on with --resume true, or " if left.get("status", "complete") != "complete" else ""
        raise InputError("output", folder, f"exists and is not empty; {way_out}choose another folder")
    if occupied and not (folder / record).is_file():
        raise InputError("output", folder, f"has no {record}: not a folder that this command wrote")
    refuse_unwritable(folder)
    if private:
        refuse_foreign(folder)
    if source is not None and occupied:
        refuse_shared_files(folder, source, scratch)
    if source is not None and copies:
        _refuse_full_disk(folder, source, occupied)


@contextmanager
def only_said(is_plan: bool, say: Callable[[str], None]) -> Iterator[None]:
    """While the context is open: what is wrong with the output of a run is said of a plan, which writes nothing.

    Args:
        is_plan: Whether there is only a plan.
        say: Called with the line that is to be printed.
    """
    try:
        yield
    except InputError as error:
        if not is_plan:
            raise
        say(f"nothing is written now, and the run would be refused: {error}")


def refuse_other_content(folder: Path, records: Collection[str], kind: str) -> None:
    """Refuse an output folder that a command cannot add to: it must be new, empty, or one that the command wrote.

    Args:
        folder: The output folder.
        records: Patterns of the names of the command's records.
        kind: What the command writes, for people.

    Raises:
        InputError: It is a file or holds something else, or cannot be written.
    """
    _refuse_no_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any(any(folder.glob(name)) for name in records):
        raise InputError("output", folder, f"exists, is not empty and holds no {kind}; choose another folder")
    refuse_unwritable(folder)


def _refuse_no_folder(folder: Path) -> None:
    """Refuse what is no folder and cannot become one, and what nobody may look at; asking further raises nothing."""
    try:
        if folder.is_symlink() and not folder.exists():
            raise InputError("output", folder, f"is a link to {os.readlink(folder)}, which does not exist")
        if folder.exists() and not folder.is_dir():
            raise InputError("output", folder, "is a file")
        if folder.resolve() == Path(folder.anchor or "/").resolve():
            raise InputError("output", folder, "is the root of the file system")
        private_folder(folder).exists()  # its name is longer
    except RuntimeError:
        raise InputError("output", folder, "leads into a circle of links") from None
    except OSError as error:
        raise InputError("output", folder, f"cannot be looked at ({error.strerror})") from None


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be made, or in which nothing can be written.

    Raises:
        InputError: It is one of these.
    """
    existing = existing_folder(folder)
    if not existing.is_dir():
        raise InputError("output", folder, f"lies in {existing}, which is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError("output", folder, f"no permission to write in {existing}")


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, which need not exist."""
    return shutil.disk_usage(existing_folder(folder)).free


def refuse_full_disk(folder: Path, needed: float, option: str = "output", value: object = None, of: str = "") -> None:
    """Refuse what would not fit beside what is on the disk already.

    Args:
        folder: Where it would be written.
        needed: How many bytes.
        option: The option at fault.
        value: Its value. Default: the folder.
        of: What takes so much, where that is not the output itself.

    Raises:
        InputError: Fewer bytes are free.
    """
    free = free_bytes(folder)
    if needed > free:
        what = f"{readable_size(needed)} for {of}" if of else readable_size(needed)
        problem = f"needs {what}, only {readable_size(free)} are free on this disk"
        raise InputError(option, folder if value is None else value, problem)


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())


def refuse_overlap(folder: Path, source: Path) -> None:
    """Refuse an output folder that lies in a checkpoint, or the other way round.

    Raises:
        InputError: It does.
    """
    source = source.resolve()
    if folder.resolve().is_relative_to(source):
        raise InputError("output", folder, f"lies inside the input checkpoint {source}")
    if source.is_relative_to(folder.resolve()):
        raise InputError("output", folder, f"holds the input checkpoint {source}")


def refuse_shared_files(folder: Path, source: CheckpointFolder, scratch: str = "") -> None:
    """Refuse an output folder with links in it: written through one, the input or another checkpoint would be lost.

    Tools that remove duplicates and some file systems make such links, symbolic and hard ones.

    Args:
        folder: The output folder.
        source: The input checkpoint.
        scratch: A folder in the output folder that is removed before anything is written there; empty for none.

    Raises:
        InputError: A file is, or may be, one of the input's or of another checkpoint's too, or is none; names it.
    """
    inputs = {identity(source.path / file): file for file in files_within(source.path)}
    copied = set(source.files()) | {Path(HELD_BACK)}
    for relative in files_within(folder):
        if relative.parts[0] == scratch:
            continue
        found, problem = (folder / relative).lstat(), ""
        if stat.S_ISLNK(found.st_mode):
            target = Path(os.path.realpath(folder / relative))  # of a circle of links, too
            written = any(file.is_relative_to(relative) for file in copied)
            if written or target.is_relative_to(source.path.resolve()) or identity(target) in inputs:
                problem = f"{relative} is a link to {target}"
        elif not stat.S_ISREG(found.st_mode):
            problem = f"{relative} is no regular file"  # a pipe would be waited for
        elif (same := inputs.get((found.st_dev, found.st_ino))) is not None:
            problem = f"{relative} is the same file as {same} of the input checkpoint"
        elif found.st_nlink > 1 and relative.suffix == ".safetensors":
            problem = f"{relative} is the same file as another one somewhere (it has {found.st_nlink} hard links)"
        if problem:
            way_out = "a run writes only files of its own; put a copy in its place, or choose another folder"
            raise InputError("output", folder, f"{problem}; {way_out}")


def identity(path: Path) -> tuple[int, int] | None:
    """What tells whether two paths are one file; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _refuse_full_disk(folder: Path, source: CheckpointFolder, occupied: bool) -> None:
    def there(file: Path) -> int:
        return (folder / file).stat().st_size if occupied and (folder / file).is_file() else 0

    needed = sum(
        max((source.path / file).stat().st_size - there(file), 0)
        for file in _copied(source)
        if file.name != "config.json"  # it may be held back under another name, and is small
    )
    refuse_full_disk(folder, needed)


def is_occupied(folder: Path, record: str) -> bool:
    """Whether there is more in a folder than what a run leaves that dies before its manifest `record` is written."""
    return folder.is_dir() and any(path.name != f"{record}.tmp" for path in folder.iterdir())


def make_folder(folder: Path) -> None:
    """Create a folder and those above it; they are there after a crash too."""
    missing = [parent for parent in (folder, *folder.resolve().parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml`, which repeats the run from its beginning, also where this one goes on."""
    config = {name: False if name == "resume" else value for name, value in config.items()}
    replace_durably(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())


@contextmanager
def going_on(way_on: str) -> Iterator[None]:
    """While the context is open, runs inside are parts of a command that goes on in its own way.

    Args:
        way_on: How, for people.
    """
    token = _OF_COMMAND.set(way_on)
    try:
        yield
    finally:
        _OF_COMMAND.reset(token)


def way_on_of_command(own: str) -> str:
    """How the command goes on: as a run does by itself (`own`), but for one that is a part of another command."""
    return _OF_COMMAND.get() or own


@contextmanager
def writing(folder: Path, way_on: str = "resume with --resume true") -> Iterator[None]:
    """What goes wrong while something is written into the output folder becomes one line.

    Args:
        folder: The output folder.
        way_on: How the command goes on, where it is not a part of another one.

    Raises:
        RunError: The disk is full, or cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library, about something else than the disk
            raise
        reason = f"{error.strerror or error} (nothing is lost; {way_on_of_command(way_on)})"
        raise RunError(f"--output {folder}: {reason}") from None


def copy_checkpoint(source: CheckpointFolder, folder: Path, leave_out: Collection[str]) -> dict[str, FileRecord]:
    """Copy a checkpoint folder, with `config.json` held back; the copy is on the disk when this returns.

    Other files with weights (`pytorch_model.bin`, `original/`, `old/model.safetensors`) are left out: they would stay
    dense; and so are logs of the run that made the input.

    Args:
        source: The input checkpoint.
        folder: Where the copy goes.
        leave_out: Records of the run that made the input, which would be taken for those of this run; a folder among
            them is left out with all that is in it.

    Returns:
        Path in the folder -> size and digest of every file that is read along with the weights.
    """
    folders, copied = {folder}, {}
    for relative in _copied(source, leave_out):
        target = folder / (HELD_BACK if str(relative) == "config.json" else relative)
        make_folder(target.parent)
        target.unlink(missing_ok=True)  # never write through what may be a link
        shutil.copyfile(source.path / relative, target)
        sync_file(target)
        folders.add(target.parent)
        if str(relative) not in (*source.shards, MODEL_CARD):  # weights and card are verified in ways of their own
            copied[relative.as_posix()] = record_of(target)
    for changed in folders:
        sync_folder(changed)
    return copied


def _copied(source: CheckpointFolder, leave_out: Collection[str] = RUN_FILES) -> Iterator[Path]:
    """Path in a checkpoint folder of every file that goes into a copy; see `copy_checkpoint`."""
    for relative in source.files():
        if {str(relative), relative.parts[0]}.isdisjoint({*leave_out, LOG_FOLDER}):
            yield relative


def said_of_copies(source: CheckpointFolder) -> str:
    """What a command says of the files that `copy_checkpoint` leaves out; empty where there are none."""
    names = source.other_copies()
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"left out: {', '.join(names[:_NAMED])}{more} (weights beside those that are loaded would stay as they are)"


def release(folder: Path) -> None:
    """Put `config.json` in place: from now on the folder can be loaded."""
    if (folder / HELD_BACK).exists():
        (folder / HELD_BACK).replace(folder / "config.json")
        sync_folder(folder)


def copied_bytes(source: CheckpointFolder) -> int:
    """Size of a copy of a checkpoint folder, without records of the run that made it."""
    return sum((source.path / file).stat().st_size for file in _copied(source))


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder, hidden ones left out."""
    return sum((folder / file).stat().st_size for file in files_within(folder) if (folder / file).is_file())
