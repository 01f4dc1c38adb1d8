"""Builds the extension in `csrc/`, once for each version of it, of torch and of Python."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).parent / "csrc"
TORCH = "2.13"
"""The version whose insides the extension knows."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lvlm-prune" / "emulated_cuda"


def why_not() -> str:
    """Why the device cannot be emulated here; empty where it can."""
    if torch.version.cuda is not None or torch.cuda.is_available():
        return "the CUDA device is emulated in a CPU build of torch only"
    if not torch.__version__.startswith(f"{TORCH}."):
        return f"the emulated CUDA device was written for torch {TORCH}, this is {torch.__version__}"
    if sys.platform != "linux":
        return f"the emulated CUDA device was written for Linux, this is {sys.platform}"
    if shutil.which("g++") is None:
        return "the emulated CUDA device is built with g++, which is not there"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the emulated CUDA device is built with Python's headers, which are not there"
    return ""


def build() -> Path:
    """The built extension, from the cache where it was built before.

    Raises:
        RuntimeError: The compiler says no; with what it said.
    """
    target = CACHE / _version() / "_emulated_cuda.so"
    if target.is_file():
        return target
    import fcntl  # not on Windows

    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that start together build it once
        if not target.is_file():
            _compile(target)
    return target


def _compile(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        done = subprocess.run(_command(built), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ cannot build the emulated CUDA device:\n{done.stderr[-4000:]}")
        built.replace(target)


def load() -> ModuleType:
    """The extension, built where it is not yet; from then on torch has a CUDA device in this process."""
    name = "_emulated_cuda"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, build())
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _version() -> str:
    """What a built extension depends on, as the name of a folder."""
    content = hashlib.sha256(f"{torch.__version__} {sys.version} {platform.machine()}".encode())
    for file in sorted(SOURCES.iterdir()):
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def _command(target: Path) -> list[str]:
    here = Path(torch.__file__).parent
    headers = (here / "include", here / "include" / "torch" / "csrc" / "api" / "include")
    libraries = here / "lib"
    return [
        *(
            "g++",
            "-std=c++20",
            "-O1",
            "-DAT_PER_OPERATOR_HEADERS",
            "-shared",
            "-fPIC",
            "-w",
            str(SOURCES / "module.cpp"),
            "-o",
            str(target),
        ),
        *(f"-I{folder}" for folder in (*headers, sysconfig.get_path("include"))),
        *(f"-L{libraries}", "-ltorch_cpu", "-lc10", "-ltorch_python", f"-Wl,-rpath,{libraries}"),
    ]
