"""The tests of the families on another version of transformers; every other package is that of this environment.

python -m tests.other_transformers "4.57.*"
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# What is said of families in the README: found, chained, streamed, pruned, in batches; and of packed checkpoints.
FILES = [
    "tests/unit/blocks/test_decoder.py",
    "tests/unit/blocks/test_execution.py",
    "tests/unit/blocks/test_modality.py",
    "tests/unit/blocks/test_streaming.py",
    "tests/integration/test_families.py",
    "tests/integration/test_batches.py",
    "tests/integration/test_packed_families.py",
    "tests/integration/test_packed_models.py",
]


def environment(requirements: Sequence[str], folder: Path) -> Path:
    """Make a virtual environment with other versions of some packages that falls back to the packages of this one.

    Args:
        requirements: As pip takes them, for example `transformers==4.57.*`; of each the newest release that fits.
        folder: Where to make it.

    Returns:
        Its Python.

    Raises:
        subprocess.CalledProcessError: pip cannot install them.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # Also those that this environment itself falls back to.
    found = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "fallback.pth").write_text("\n".join([*found, ""]))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *requirements], check=True)
    return python


def run_tests(python: Path, *options: str, files: Sequence[str] = FILES) -> int:
    """Run the tests of the families, or of other files; the exit status of pytest."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files]
    return subprocess.run(command, cwd=REPOSITORY, env=variables).returncode


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        version, *options = sys.argv[1:]
        sys.exit(run_tests(environment([f"transformers=={version}"], Path(scratch, "environment")), *options))
