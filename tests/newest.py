"""The newest releases of the packages that change most, in an environment of their own: does everything still work?

python -m tests.newest                          all of them together
python -m tests.newest transformers             one, to see which of them broke what
python -m tests.newest --list                   what is bounded, tested and to be had; installs nothing here

`pyproject.toml` bounds these packages below the minor version that nobody has tested. This asks pip for their newest
releases whatever the bound, and runs the tests of families, command line and processors. Where they pass, run the whole
suite in such an environment (`--keep FOLDER`), then raise the bound.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.other_transformers import FILES, REPOSITORY, environment, run_tests

PACKAGES = ("transformers", "lightning", "jsonargparse", "peft")
# Beside the families: the command line, processors, training.
MORE_FILES = [
    "tests/unit/test_cli_errors.py",
    "tests/integration/test_bad_input.py",
    "tests/integration/test_lifecycle.py",
    "tests/integration/test_processors.py",
    "tests/integration/test_hub_folders.py",
    "tests/integration/test_recover.py",
]


def bounded() -> dict[str, Requirement]:
    """What `pyproject.toml` asks for, by the package's name."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        requirements = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    return {requirement.name: requirement for requirement in requirements}


def unbounded(requirement: Requirement) -> str:
    """The requirement without its upper bound; releases that it leaves out stay out."""
    kept = SpecifierSet(",".join(str(part) for part in requirement.specifier if part.operator != "<"))
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{kept}"


def installed(python: Path, name: str) -> str:
    """The version that an environment imports."""
    command = [python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Install, say what is new, test; the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"default: {' '.join(PACKAGES)}")
    parser.add_argument("--keep", type=Path, help="make the environment in this folder, and leave it there")
    parser.add_argument("--list", action="store_true", help="run no tests")
    options = parser.parse_args()
    requirements = bounded()
    if unknown := set(options.packages) - set(PACKAGES):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PACKAGES)}")
    names = options.packages or PACKAGES
    with tempfile.TemporaryDirectory() as scratch:
        python = environment([unbounded(requirements[name]) for name in names], options.keep or Path(scratch, "newest"))
        for name in PACKAGES:
            version, bound = installed(python, name), requirements[name].specifier
            news = "as bounded" if bound.contains(version) else "newer than the bound"
            print(f"{name:14} {version:10} {bound!s:28} {news}", flush=True)
        if options.list:
            return 0
        status = run_tests(python, "--tb=short", "-rfE", files=[*FILES, *MORE_FILES])
    print("all pass" if status == 0 else "the tests named above fail with these releases")
    return status


if __name__ == "__main__":
    sys.exit(main())
