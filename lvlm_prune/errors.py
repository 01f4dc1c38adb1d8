"""The one kind of error that a user is meant to read."""

from typing import Any


class LVLMPruneError(Exception):
    """Something the user can mend. The command line prints it as one line, `error: ...`, and exits with status 2.

    Everything else (an exception of a plugin, a bug) keeps its traceback.
    """


class InputError(LVLMPruneError):
    """A bad option or a bad file behind an option.

    Args:
        option: Name of the option as it is written in YAML, for example `model.path`.
        value: The value that was given.
        problem: What is wrong with it and, where there is one, the way out.

    Example:
        >>> raise InputError("pruning.sparsity", 1.5, "must lie strictly between 0 and 1")
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.InputError: --pruning.sparsity 1.5: must lie strictly between 0 and 1
    """

    def __init__(self, option: str, value: Any, problem: str) -> None:
        super().__init__(f"--{option} {value}: {problem}")
        self.option = option
        self.value = value
        self.problem = problem


class RunError(LVLMPruneError):
    """A fault that could only appear during the run: a broken image, NaN in a block, a full disk.

    The output folder stays as it is and can be resumed.
    """
