"""Every instruction set, and a compiler."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lvlm_prune.packed.kernels import native
from lvlm_prune.packed.kernels.native import Level, limited_to

HERE = Path(__file__).parent
SOURCES = Path(native.__file__).parent


@pytest.fixture(scope="session")
def compile_kernels(tmp_path_factory) -> Callable[..., Path]:
    """Compile a C++ file that may include `packed.cpp`; AVX-512 is emulated."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs a C++ compiler and an x86-64 processor")

    def compile_one(source: Path, *flags: str) -> Path:
        result = tmp_path_factory.mktemp("kernels") / source.stem
        command = [compiler, "-std=c++17", "-O0", "-g", "-I", str(SOURCES), "-include", str(HERE / "avx512_emulated.h")]
        built = subprocess.run([*command, *flags, str(source), "-o", str(result)], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return result

    return compile_one


@pytest.fixture(scope="session")
def emulated_library(compile_kernels) -> Path:
    """The library as on a machine with AVX-512."""
    return compile_kernels(SOURCES / "packed.cpp", "-shared", "-fPIC")


@pytest.fixture(params=["torch", "plain", "avx2", "avx512"])
def kernels(request, monkeypatch):
    """Run the test with this instruction set; AVX-512 is emulated where this machine does not have it."""
    wanted = Level[request.param.upper()]
    emulated = wanted == Level.AVX512 and native.level() < wanted
    if emulated:
        path = request.getfixturevalue("emulated_library")
        monkeypatch.setattr(native, "_path", lambda: path)
        _forget_library()
    with limited_to(request.param) as level:
        if level != wanted:
            pytest.skip(f"needs {request.param}; here is {level.name.lower()}")
        yield level
    if emulated:
        monkeypatch.undo()
        _forget_library()


def _forget_library() -> None:
    native.library.cache_clear()
    native._best.cache_clear()
