"""A process with an emulated CUDA device, in which tests run what they test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.emulated_cuda import building, runs
from tests.emulated_cuda.process import DeviceProcess
from tests.emulated_cuda.runs import Outcome

# It turns the device on where Python starts, which is not what collecting tests is to do.
collect_ignore = ["autostart"]


@pytest.fixture(scope="session")
def built() -> Path:
    """The extension; tests are skipped where it cannot be built."""
    if reason := building.why_not():
        pytest.skip(reason)
    return building.build()


@pytest.fixture(scope="session")
def process(built: Path) -> Iterator[DeviceProcess]:
    """The process with one emulated device that most tests share."""
    with DeviceProcess() as process:
        yield process


@pytest.fixture
def on_device(process: DeviceProcess) -> Callable[..., Any]:
    """Call a function of a module in the process with the emulated device; what it returns."""
    return process


@pytest.fixture
def run(on_device: Callable[..., Any], tmp_path: Path) -> Callable[..., Outcome]:
    """Run a command line in the process with the emulated device."""

    def command(*arguments: str, output: Path = tmp_path / "out", keep: bool = False) -> Outcome:
        return on_device(runs.command, arguments, output, keep)

    return command
