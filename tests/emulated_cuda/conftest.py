"""A process with an emulated CUDA device, in which tests run what they test."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.emulated_cuda import building, runs
from tests.emulated_cuda.runs import Outcome

# It turns the device on where Python starts, which is not what collecting tests is to do.
collect_ignore = ["autostart"]


@pytest.fixture(scope="session")
def built() -> Path:
    """The extension; tests are skipped where it cannot be built."""
    if reason := building.why_not():
        pytest.skip(reason)
    return building.build()


def process_with_device(devices: int = 1, gigabytes: float = 24) -> ProcessPoolExecutor:
    """A process of its own with emulated devices; ends with the context."""
    visible = {"EMULATED_CUDA_DEVICES": str(devices), "EMULATED_CUDA_GB": str(gigabytes)}
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=runs.start, initargs=(visible,))


@pytest.fixture(scope="session")
def process(built: Path) -> Iterator[ProcessPoolExecutor]:
    """The process with one emulated device that most tests share."""
    with process_with_device() as process:
        yield process


@pytest.fixture
def on_device(process: ProcessPoolExecutor) -> Callable[..., Any]:
    """Call a function of a module in the process with the emulated device; what it returns."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return process.submit(function, *arguments, **options).result()

    return call


@pytest.fixture
def run(on_device: Callable[..., Any], tmp_path: Path) -> Callable[..., Outcome]:
    """Run a command line in the process with the emulated device."""

    def command(*arguments: str, output: Path = tmp_path / "out", keep: bool = False) -> Outcome:
        return on_device(runs.command, arguments, output, keep)

    return command
