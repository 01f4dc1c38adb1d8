"""The tests of the families on another version of transformers; every other package is that of this environment.

python -m tests.other_transformers "4.57.*"
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# What is said of families in the README: found, chained, streamed, pruned, in batches.
FILES = [
    "tests/unit/blocks/test_decoder.py",
    "tests/unit/blocks/test_execution.py",
    "tests/unit/blocks/test_modality.py",
    "tests/unit/blocks/test_streaming.py",
    "tests/integration/test_families.py",
    "tests/integration/test_batches.py",
]


def environment(version: str, folder: Path) -> Path:
    """Make a virtual environment with transformers of this version that falls back to the packages of this one.

    Args:
        version: As pip takes it, for example `4.57.*`.
        folder: Where to make it.

    Returns:
        Its Python.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "fallback.pth").write_text("\n".join([*site.getsitepackages(), ""]))
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={version}"], check=True)
    return python


def run_tests(python: Path, *options: str) -> int:
    """Run the tests of the families; the exit status of pytest."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *FILES]
    return subprocess.run(command, cwd=REPOSITORY, env=variables).returncode


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run_tests(environment(sys.argv[1], Path(scratch, "environment")), *sys.argv[2:]))
