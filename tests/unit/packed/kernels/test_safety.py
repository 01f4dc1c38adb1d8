"""No packed matrix makes a kernel read or write out of bounds: what its pieces say is checked before."""

import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.cpp")


@pytest.fixture(scope="module")
def fuzz(compile_kernels) -> Path:
    return compile_kernels(FUZZ, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_what_the_checks_accept_stays_within_its_tensors(fuzz):
    result = run(fuzz)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_without_the_checks_the_same_matrices_do_not(fuzz):
    """The test above can fail: the address sanitizer sees what the checks keep away."""
    result = run(fuzz, "unchecked")
    assert result.returncode not in (0, 3, 4)
    assert "AddressSanitizer" in result.stderr
