"""The versions of transformers that the README promises."""

import subprocess
from pathlib import Path

import pytest

from tests.other_transformers import environment, run_tests


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.57.*", "5.0.*", "5.12.*", "5.24.*"])
def test_families_on_another_version(version: str, tmp_path: Path) -> None:
    try:
        python = environment([f"transformers=={version}"], tmp_path / "environment")
    except subprocess.CalledProcessError:
        pytest.skip(f"pip cannot install transformers {version} here")
    assert run_tests(python) == 0
