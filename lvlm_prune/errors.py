"""The one kind of error that a user is meant to read."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from os.path import exists, isdir
from typing import Any

LONGEST_VALUE = 300
"""Characters of a value in a message; longer ones are cut in the middle."""

_LONGEST_WORD = 2**10  # of an error; a longer one is no option and no file that anybody wrote

LARGEST_COUNT = 2**31 - 1
"""No number that counts something is larger."""

LONGEST_FILE_NAME = 255
"""Bytes; no file system takes a longer name."""


class LVLMPruneError(Exception):
    """Something the user can mend. The command line prints it as one line, `error: ...`, and exits with status 2.

    Everything else (an exception of a plugin, a bug) keeps its traceback.
    """

    agreed: bool = False
    """True once the processes of a run agreed that this one, of those that failed, shows its error."""


def whole(value: Any) -> Any:
    """A whole number without a decimal point; other values as they are.

    Example:
        >>> whole(2.0), whole(0.5), whole("2.0")
        (2, 0.5, '2.0')
    """
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


class InputError(LVLMPruneError):
    """A bad option or a bad file behind an option.

    Args:
        option: Name of the option as it is written in YAML, for example `model.path`; empty for a value that is given
            without one, as the folders of `compare` are.
        value: The value that was given; a whole number is shown without a decimal point.
        problem: What is wrong with it and, where there is one, the way out.

    Example:
        >>> raise InputError("pruning.sparsity", 1.5, "must lie strictly between 0 and 1")
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --pruning.sparsity 1.5: must lie strictly between 0 and 1
    """

    def __init__(self, option: str, value: Any, problem: str) -> None:
        shown = shortened(whole(value), LONGEST_VALUE)
        super().__init__(f"--{option} {shown}: {problem}" if option else f"{shown}: {problem}")
        self.option = option
        self.value = value
        self.problem = problem


@contextmanager
def given_as(option: str) -> Iterator[None]:
    """While the context is open a checkpoint is read that another option than `model.path` names, whose fault it is.

    Raises:
        InputError: That of the context, under its own option.

    Example:
        >>> with given_as("baseline"):
        ...     raise InputError("model.path", "a", "no such folder")
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --baseline a: no such folder
    """
    try:
        yield
    except InputError as error:
        if error.option != "model.path":
            raise
        raise InputError(option, error.value, error.problem) from error


def refuse_huge(option: str, value: int | None, most: int | None = None) -> None:
    """Refuse a number that counts something and is larger than anything there is: memory and loops would not end.

    Args:
        option: Its option.
        value: The number; None where it is not given.
        most: The largest that there is; default: what 32 bits hold.

    Raises:
        InputError: It is.

    Example:
        >>> refuse_huge("data.batch_size", 10**20)
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --data.batch_size 100000000000000000000: must be at most 2147483647
    """
    most = LARGEST_COUNT if most is None else most
    if value is not None and value > most:
        raise InputError(option, value, f"must be at most {most}")


def one_line(value: Any) -> str:
    r"""Text on one line that every terminal and file takes, whatever a file name or a record had in it.

    What is not printed, escape sequences of terminals above all, is spelled out.

    Example:
        >>> one_line("a\nb\udcff\x1b[31m")
        'a b\\udcff\\x1b[31m'
    """
    text = " ".join(str(value).split())
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def error_line(error: Any) -> str:
    """What is printed of an error: one line, in which no word goes on for pages.

    Example:
        >>> error_line("no such\\nfile"), len(error_line("x" * 10**6))
        ('error: no such file', 234)
    """
    words = one_line(error).split(" ")
    return " ".join(
        ["error:", *(shortened(word, LONGEST_VALUE) if len(word) > _LONGEST_WORD else word for word in words)]
    )


def shortened(value: Any, longest: int = 80) -> str:
    """The same, cut in the middle where it is longer than so many characters: an image may be its own name.

    Example:
        >>> shortened("data:image/png;base64,iVBORw0KGgo", 20)
        'data:imag...0KGgo'
    """
    text = one_line(value)
    head, tail = longest // 2 - 1, longest // 4
    return text if len(text) <= longest else f"{text[:head]}...{text[-tail:]}"


def meant(name: Any, known: Iterable[str]) -> str:
    """What a misspelt name may be meant to be, to go on with a sentence; empty where nothing comes close.

    Args:
        name: What was given.
        known: The names that there are.

    Example:
        >>> meant("wandaa", ["atv", "wanda"])
        '; is wanda meant?'
    """
    return "".join(f"; is {one} meant?" for one in get_close_matches(str(name), list(known), n=1))


class RunError(LVLMPruneError):
    """A fault that could only appear during the run: a broken image, NaN in a block, a full disk.

    The output folder stays as it is and can be resumed.
    """


class ProcessLost(RunError):
    """A process of the run is gone without a word: killed, or out of memory.

    Args:
        what: What is known of it.
    """

    def __init__(self, what: str = "a process of this run ended without a word (killed, or out of memory)") -> None:
        super().__init__(f"{what}; nothing is lost, resume with --resume true")


class OtherProcessFailed(Exception):
    """Another process of the run failed and shows its error; this one ends with the same exit status.

    Args:
        rank: Number of the process.
        problem: Its error, in one line or more.
        status: Its exit status.
    """

    def __init__(self, rank: int, problem: str, status: int) -> None:
        super().__init__(f"process {rank} failed: {problem}")
        self.status = status


class Terminated(KeyboardInterrupt):
    """An interruption by SIGTERM, as schedulers send it some seconds before they kill."""


def exit_status(error: BaseException) -> int:
    """Exit status of the command line: 2 what the user can mend, 130 Ctrl-C, 143 SIGTERM, 1 everything else."""
    if isinstance(error, OtherProcessFailed):
        return error.status
    if isinstance(error, LVLMPruneError):
        return 2
    if isinstance(error, Terminated):
        return 128 + signal.SIGTERM
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def why_no_file(path: Any) -> str:
    """What a path is that is no file to be read.

    Example:
        >>> why_no_file("/no/such"), why_no_file("/dev"), why_no_file("/dev/null")
        ('no such file', 'is a folder', 'is no regular file')
    """
    # A pipe would be waited for.
    return "is a folder" if isdir(path) else "is no regular file" if exists(path) else "no such file"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing.

    Example:
        >>> first_line(ValueError("too long\\nby far")), first_line(KeyError())
        ('too long', 'KeyError')
    """
    said = str(error).strip()
    return shortened(said.splitlines()[0], LONGEST_VALUE) if said else type(error).__name__
