"""The command line's first steps: what torch and transformers read from the environment when they are imported.

lvlm-prune prune --config configs/prune/atv.yaml --model.path CHECKPOINT --pruning.sparsity 0.6 --output DIR
lvlm-prune methods [NAME]
lvlm-prune completion bash
lvlm-prune recover --method lora --model.path PRUNED --output DIR
lvlm-prune evaluate --model.path PRUNED --baseline CHECKPOINT --output DIR
lvlm-prune compare FOLDER FOLDER --output DIR
lvlm-prune probe --model.path CHECKPOINT --probing.sparsities [0.5,0.6] --output DIR
lvlm-prune pack --model.path PRUNED --output DIR
lvlm-prune unpack --model.path PACKED --output DIR
lvlm-prune sweep --recipes 'configs/prune/*.yaml' --grid '{pruning.sparsity: [0.5, 0.6]}' --seeds '[0, 1]' --output DIR
lvlm-prune reproduce atv/table_2 --output DIR
"""

import atexit
import errno
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import NoReturn, TextIO

from lvlm_prune import __version__
from lvlm_prune.clock import command
from lvlm_prune.distributed.ranks import refuse_wrong_ranks
from lvlm_prune.errors import LVLMPruneError, error_line
from lvlm_prune.threads import wait_asleep


def silence_libraries() -> None:
    """Nothing on the screen but what this program says: no banners, tips or warnings of libraries."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it cannot read is said in a line of ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of torch, whose profiler says when it starts and stops


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; default: the process' own.

    Returns:
        Exit status: 0 done and verified, 2 something the user can mend. Exceptions of plugins and bugs are raised.
    """
    with command():
        try:
            return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        except LVLMPruneError as error:
            print(error_line(error), file=sys.stderr)
            return 2
        except MemoryError:
            print("error: something asks for more memory than there is", file=sys.stderr)
            return 2


def _dispatch(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from lvlm_prune.packed.library_file import library_file

        built = "built" if library_file() else "not built (no compiler was there when this was installed)"
        print(f"lvlm-prune {__version__}\npacked kernels: {built}; `lvlm-prune kernels` says which are used here")
        return 0
    if not arguments or arguments[0] in ("--help", "-h"):
        from lvlm_prune.cli_help import commands_help

        print(commands_help(__version__), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if len(arguments) == 2 and arguments[1] in ("--help", "-h"):
        from lvlm_prune.cli_help import stored_help

        if text := stored_help(arguments[0]):
            print(text, end="")
            return 0
    if arguments == ["kernels"]:
        from lvlm_prune.packed.kernels import kernel_report

        print(kernel_report())
        return 0
    if arguments[:1] == ["methods"] and len(arguments) < 3:
        from lvlm_prune.recipes import recipe_text, recipes_table

        print(recipe_text(arguments[1]) if arguments[1:] else recipes_table())
        return 0
    if arguments[:1] == ["completion"]:
        from lvlm_prune.cli_completion import WRITES_COMPLETION, completion_problem

        if problem := completion_problem(arguments[1:]):
            print(error_line(f"completion {' '.join(arguments[1:]) or chr(39) * 2}: {problem}"), file=sys.stderr)
            return 2
        os.environ[WRITES_COMPLETION] = "true"
        arguments = [f"--print_completion=shtab-{arguments[1]}"]
    if arguments == ["reproduce"]:
        from lvlm_prune.runs.reproduce.listing import listing

        print(listing())
        return 0
    if arguments[:1] == ["reproduce"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments[1] = f"--table={arguments[1]}"
    from lvlm_prune.cli_help import misspelt

    if problem := misspelt(arguments):
        print(error_line(problem), file=sys.stderr)
        return 2
    refuse_wrong_ranks()
    silence_libraries()
    wait_asleep()
    gc.disable()  # thousands of modules come in now, and none of them is garbage: a tenth of the time goes there
    try:
        from lvlm_prune.cli_parser import run
    finally:
        gc.enable()
    return run(arguments)


def console() -> NoReturn:
    """The program `lvlm-prune`: `main` in a process that is all its own.

    To let go of everything in order, as Python does at its end, takes seconds, and a thread of a library that is inside
    C++ then can end the process with another status. So the process ends at once; an interruption does not even wait
    for what was asked to be done at the end. A reader that went away (`| head -1`) ends it quietly, a full disk behind
    `>` in one line. A stream that the caller closed takes what is said and drops it.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = main()
        except SystemExit as ended:  # of argparse, once it has printed a help
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.stdout.flush()
    except KeyboardInterrupt:  # while libraries were imported
        status = 128 + signal.SIGINT
        print("interrupted", file=sys.stderr)
    except OSError as error:
        if not _is_lost(sys.stdout, error):
            raise
        status = 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 2
        if status == 2:
            with suppress(OSError):  # it may have been this one
                print(f"error: standard output: {error.strerror}", file=sys.stderr)
    if status <= 128:
        # What was asked to be done at the end, by loggers for example; as `multiprocessing` ends its own processes.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _open_closed_streams() -> None:
    """Put streams that lead nowhere in the place of those that were closed (`>&-`), which Python has as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # its number is that of the stream, the lowest that is free


def _is_lost(stream: TextIO, error: OSError) -> bool:
    """Whether an error is that of a stream to which nothing can be written; what waits in it is dropped then."""
    if error.filename is not None or error.errno not in (
        errno.EPIPE,
        errno.ENOSPC,
        errno.EIO,
        errno.EDQUOT,
        errno.EFBIG,
    ):
        return False
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # not a file: captured by whoever called
        return False
    return True


if __name__ == "__main__":
    console()
