"""The layers contract: which room of the package may touch which, checked by import-linter.

python -m tests.layers

The contract stands in `pyproject.toml`. `callbacks/` lies beside the package and is installed inside it, which
import-linter cannot know: it is shown a copy in which both are together.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def main() -> int:
    """Check the contract.

    Returns:
        Exit status of import-linter: 0 where it holds.
    """
    config = REPOSITORY / "pyproject.toml"
    code = (
        f"import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports({str(config)!r}, no_cache=True))"
    )
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "lvlm_prune"
        only_code = shutil.ignore_patterns("__pycache__", "checkpoint")
        shutil.copytree(REPOSITORY / "lvlm_prune", package, ignore=only_code, dirs_exist_ok=True)
        shutil.copytree(REPOSITORY / "callbacks", package / "callbacks", ignore=only_code)
        variables = os.environ | {"PYTHONPATH": folder}
        return subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
