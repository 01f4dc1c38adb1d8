"""Commands in processes of their own that need not import anything: forks of one that has imported everything.

    test session ──forks before the first test──► template ──forks──► watcher ──forks──► command
         ▲                                                              │ process id, exit status
         └──────────────────────────────────────────────────────────────┘

To start Python and import torch and transformers takes several times as long as most commands that tests run. A fork
has a process id, a session, an environment, a working directory, standard streams, signals and an exit status of its
own, as `python -m` would have. Only what libraries read from the environment when they are imported is that of the test
session; tests of that start Python anew.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

REPOSITORY = Path(__file__).parents[1]
# What a command imports when it gets there, beyond what test modules import.
_MODULES = (
    "lvlm_prune.cli_parser",
    "lvlm_prune.runs.prune.run",
    "transformers.models.llava.modeling_llava",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
)
CLI = "lvlm_prune.cli"


class Command:
    """A command that runs; attributes and methods are those of `subprocess.Popen`.

    Args:
        pid: Of its process.
        report: File descriptor from which the exit status can be read when the process is gone.
        output: File that takes what it prints.
        errors: File descriptor of a pipe: also open as long as a process lives that it started.
    """

    def __init__(self, pid: int, report: int, output: IO[bytes], errors: int) -> None:
        self.pid, self.returncode = pid, None
        self._report, self._output, self._errors = report, output, errors

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None as long as the process runs."""
        return self._ask(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once the process is gone.

        Raises:
            subprocess.TimeoutExpired: It is not gone after `timeout` seconds.
        """
        status = self._ask(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for it and for what it started; what it printed, and its errors.

        Raises:
            subprocess.TimeoutExpired: Not all are gone after `timeout` seconds.
        """
        said, deadline = b"", time.monotonic() + (1e9 if timeout is None else timeout)
        while True:
            if not select.select([self._errors], [], [], max(0, deadline - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            part = os.read(self._errors, 2**16)
            if not part:
                break
            said += part
        os.close(self._errors)
        self.wait(timeout)
        self._output.seek(0)
        return self._output.read().decode(), said.decode()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once if it runs."""
        self.send_signal(signal.SIGKILL)

    def _ask(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = _number(os.read(self._report, 8))
            os.close(self._report)
        return self.returncode


class Template:
    """The process whose forks commands are; itself a fork of the test session, made before the first test."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        if os.fork() == 0:
            _serve(theirs)
        theirs.close()

    def start(self, module: str, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Command:
        """Start `python -m MODULE ARGUMENTS` in a session of its own, without standard input."""
        output = tempfile.TemporaryFile()  # noqa: SIM115
        (errors, said), (report, reported) = os.pipe(), os.pipe()
        request = {"module": module, "arguments": list(arguments), "cwd": str(cwd), "environment": dict(environment)}
        content = json.dumps(request).encode()
        socket.send_fds(self._connection, [_bytes(len(content))], [output.fileno(), said, reported])
        self._connection.sendall(content)
        os.close(said)
        os.close(reported)
        return Command(_number(os.read(report, 8)), report, output, errors)

    def close(self) -> None:
        """End the process."""
        self._connection.close()


template: Template | None = None
"""That of this session, where it has one: on Linux, where a process with the libraries' threads at rest may fork."""


def start(*arguments: object, cwd: Path, module: str = CLI, **environment: str) -> Command | subprocess.Popen[str]:
    """Start a command, or another module of Python's, with one thread, as the leader of a session."""
    words, variables = [str(argument) for argument in arguments], os.environ | {"OMP_NUM_THREADS": "1"} | environment
    if template is not None:
        return template.start(module, words, cwd, variables)
    return start_python(module, *words, cwd=cwd, environment=variables)


def start_python(module: str, *arguments: str, cwd: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a module of Python's as `start` does, and import everything."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test session in the background ignores Ctrl-C, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: object, cwd: Path, timeout: float = 600, fresh: bool = False, **environment: str):
    """Run a command as a user does; `fresh` or with variables of its own, Python starts anew.

    Returns:
        A `subprocess.CompletedProcess`.

    Raises:
        subprocess.TimeoutExpired: It takes longer than `timeout` seconds.
    """
    if fresh or environment:
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        started = start_python(CLI, *map(str, arguments), cwd=cwd, environment=variables)
    else:
        started = start(*arguments, cwd=cwd)
    try:
        output, errors = started.communicate(timeout=timeout)
    finally:
        started.kill()
    return subprocess.CompletedProcess(list(arguments), started.returncode, output, errors)


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "big", signed=True)


def _number(content: bytes) -> int:
    return int.from_bytes(content, "big", signed=True)


# ---- in the template and its forks -----------------------------------------------------------------------------------
def _serve(connection: socket.socket) -> NoReturn:
    """Fork a watcher for each command that is asked for, until the session ends."""
    try:
        _leave_pytest(connection.fileno())
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are gone without being waited for
        warm, made = False, list[list[str]]()
        while True:
            length, files, _, _ = socket.recv_fds(connection, 8, 3)
            if not length:
                os._exit(0)
            content = b""
            while len(content) < _number(length):
                content += connection.recv(_number(length) - len(content))
            if not warm:
                for module in _MODULES:
                    importlib.import_module(module)
                warm = True
            request = json.loads(content)
            if request["module"] == CLI and request["arguments"][:1] not in made:
                made.append(request["arguments"][:1])
                _make_options(request["arguments"][:1])
            gc.collect()
            gc.freeze()
            if os.fork() == 0:
                _watch(request, *files)
            for file in files:
                os.close(file)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(1)


def _make_options(verb: list[str]) -> None:
    """Let the test session remember the options of a command, for all forks; see `tests.conftest`."""
    from lvlm_prune import cli_parser

    parse = cli_parser.LVLMCLI.parse_arguments

    def stop(*_: object) -> NoReturn:
        raise _Made

    cli_parser.LVLMCLI.parse_arguments = stop
    try:
        cli_parser.run(verb)
    except _Made:
        pass
    finally:
        cli_parser.LVLMCLI.parse_arguments = parse


class _Made(Exception):
    """The options of a command are made."""


def _leave_pytest(connection: int) -> None:
    """Drop what a process that pytest forks inherits and `python -m` does not."""
    faulthandler.disable()
    atexit._clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_of_pytest(finder)]
    for name, module in list(sys.modules.items()):
        if _is_of_pytest(getattr(module, "__loader__", None)):
            del sys.modules[name]  # test modules, whose assertions it rewrote
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    logging.root.handlers.clear()
    os.closerange(3, connection)
    os.closerange(connection + 1, 1024)


def _is_of_pytest(thing: object) -> bool:
    return type(thing).__module__.startswith("_pytest.")


def _watch(request: dict[str, Any], output: int, errors: int, report: int) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        _become(request, output, errors)
    os.write(report, _bytes(pid))
    _, status = os.waitpid(pid, 0)
    os.write(report, _bytes(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _become(request: dict[str, Any], output: int, errors: int) -> NoReturn:
    """What `python -m` does."""
    os.setsid()
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, errors)):
        os.dup2(file, number)
    os.closerange(3, 1024)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    searched = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [path for path in sys.path if path not in ("", str(REPOSITORY))]
    sys.path[:] = [request["cwd"], *searched, *installed]
    sys.argv = ["-m", *request["arguments"]]
    _use_own_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # that the module is known already
    status = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _use_own_streams() -> None:
    """Python's streams and those of loggers are those of pytest until then."""
    sys.stdin = sys.__stdin__ = os.fdopen(0)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace")
    for name in logging.root.manager.loggerDict:
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr
