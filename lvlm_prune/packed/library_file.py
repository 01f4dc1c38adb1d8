"""Where the kernels in C++ are, found without importing a library."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def library_file() -> Path | None:
    """The shared library that was built when this package was installed; None where no compiler was there."""
    folder = Path(__file__).parent / "kernels"
    return next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_packed{suffix}").exists()), None)
