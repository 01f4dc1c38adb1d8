"""Where the kernels in C++ are, found without importing a library."""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def library_file() -> Path | None:
    """The shared library that was built when this package was installed; None where no compiler was there.

    It is beside the modules, or where the package is installed: Python that is started in a clone imports the clone,
    beside whose modules nothing was built.
    """
    own = Path(__file__).parent / "kernels"
    installed = [Path(entry) / "lvlm_prune" / "packed" / "kernels" for entry in sys.path]
    paths = (folder / f"_packed{suffix}" for folder in (own, *installed) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)
