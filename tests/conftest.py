"""Fixtures that every test may use."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden" / "qwen2_vl"
REPOSITORY = Path(__file__).parents[1]
GOLDEN_ARGUMENTS = [
    "prune",
    f"--model.path={GOLDEN / 'model'}",
    "--data.source=TensorSource",
    f"--data.source.path={GOLDEN / 'calib.safetensors'}",
    # Figures take seconds; tests of the report ask for it.
    "--report=false",
]


# Sums come out in another order with another number of threads; what tests compare byte by byte is made with one.
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, deal tests out in long rows, so that what the tests of a file share is made once or twice."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def _no_leaks():
    """A test that leaves a process group or an environment variable behind fails."""
    before = dict(os.environ)
    yield
    assert not torch.distributed.is_initialized()
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    # KMP_: scikit-learn sets one when it is imported.
    allowed = ("PYTEST_", "TRANSFORMERS_", "TOKENIZERS_", "HF_", "KMP_")
    assert not {name for name in changed if not name.startswith(allowed)}


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `lvlm-prune` as a user does, in a process of its own, in an empty working directory."""

    def run(*arguments: str, cwd: Path = tmp_path, timeout: float = 600, **environment: str):
        command = [sys.executable, "-m", "lvlm_prune.cli", *map(str, arguments)]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def golden_arguments() -> list[str]:
    """Model and calibration set of the reference numbers, on the command line."""
    return list(GOLDEN_ARGUMENTS)


@pytest.fixture
def keep_packed(monkeypatch: pytest.MonkeyPatch):
    """Small packed matrices stay packed in memory, also where a dense product is faster."""
    monkeypatch.setenv("LVLM_PRUNE_KERNELS", "avx512")
