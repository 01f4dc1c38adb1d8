"""Which kernels are used: the best ones of the machine, or lesser ones that were asked for."""

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from lvlm_prune import __version__
from lvlm_prune.cli import main
from lvlm_prune.errors import LVLMPruneError
from lvlm_prune.packed import library_file as library_file_module
from lvlm_prune.packed.kernels import kernel_report, native


def test_asking_for_more_than_there_is_gives_what_there_is():
    best = native.level()
    with native.limited_to("avx512") as level:
        assert level == best
    with native.limited_to("torch") as level:
        assert level == native.Level.TORCH
    assert native.level() == best


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(native.FORCE, "avx1024")
    native._from_environment.cache_clear()
    with pytest.raises(LVLMPruneError, match=r"avx1024.*avx2"):
        native.level()
    monkeypatch.undo()
    native._from_environment.cache_clear()


def test_the_kernels_of_this_machine_are_said(run_cli):
    result = run_cli("kernels")
    assert result.stdout.splitlines() == [kernel_report()]


@pytest.mark.parametrize("built", [True, False])
def test_the_version_says_whether_kernels_were_built(capsys, monkeypatch, built):
    file = Path("kernels.so") if built else None
    monkeypatch.setattr("lvlm_prune.packed.library_file.library_file", lambda: file)
    assert main(["--version"]) == 0
    version, kernels = capsys.readouterr().out.splitlines()
    assert version == f"lvlm-prune {__version__}"
    assert kernels.startswith(f"packed kernels: {'built;' if built else 'not built (no compiler'}")


def test_a_library_of_another_version_is_not_used(compile_kernels, monkeypatch, tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int lvlm_version() { return 1000; }')
    path = compile_kernels(source, "-shared", "-fPIC")
    monkeypatch.setattr(native, "library_file", lambda: path)
    native.library.cache_clear()
    native._best.cache_clear()
    assert native.library() is None
    assert native.level() == native.Level.TORCH
    assert "plain torch" in kernel_report()
    monkeypatch.undo()
    native.library.cache_clear()
    native._best.cache_clear()


def test_python_started_in_a_clone_uses_the_kernels_that_were_installed(tmp_path):
    """A clone is imported in preference to the installed package, and beside its modules nothing was built."""
    module = Path(library_file_module.__file__)
    clone, installed = tmp_path / "library_file.py", tmp_path / "site" / "lvlm_prune" / "packed" / "kernels"
    shutil.copy(module, clone)
    code = "import library_file; print(library_file.library_file())"
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'site'}"}

    def found() -> str:
        command = [sys.executable, "-S", "-c", code]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    assert found() == "None"
    installed.mkdir(parents=True)
    (library := installed / f"_packed{EXTENSION_SUFFIXES[0]}").touch()
    assert found() == str(library)
