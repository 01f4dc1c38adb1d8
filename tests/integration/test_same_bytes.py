"""Checkpoints are, byte for byte, those of an earlier version: a change of results is never an accident.

The digests were made at commit 987d436 with one thread; that of few samples on an EPYC by a later version that still
gave those of commit 987d436. Sums come out in another order on other instruction sets, so newer CPUs are told to use
AVX2. A Xeon with AVX-512 that is told so still has another order than an EPYC where products are in bfloat16: there are
two digests.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ALL_BLOCKS, ALL_SAMPLES, GOLDEN_ARGUMENTS

_AS_THEN = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
_QUICK_START = ["prune", "--pruning.sparsity=0.6", "--evaluate=false", "--report=false"]
_DIGESTS = {
    "golden": (
        [*GOLDEN_ARGUMENTS, ALL_BLOCKS, ALL_SAMPLES],
        ["6d21955cd3a84c791a8e5467f4704b68f3441ddf565e5ec36d6ded381e8570ea"],
    ),
    "demo, 6 samples": (
        [*_QUICK_START, "--data.num_samples=6"],
        [
            "bfe3ad862440dcbfcfadbf40a802ed0264d308efc94e16f3919020e4cb54a70d",
            "ac1cfa07529677accca490f96992cf373aa979aebd672a9c73780ce1c32702df",
        ],
    ),
    "demo": (
        _QUICK_START,
        [
            "0c7ab3175aa12016364c1bd4e9ebdff808e025c645b93bf3ded6ec92c45edae6",
            "df347d992154890127bc14ddb7dcd376f9a1e6a533685be9e087af63ce0ca303",
        ],
    ),
}


_RUNS = """
import json, os, sys
from lvlm_prune.cli import main
failed = any([main(arguments) for arguments in json.loads(sys.argv[1])])
sys.stderr.flush()
os._exit(failed)  # as the program itself ends: threads of libraries can abort a process that lets go of everything
"""


@pytest.fixture(scope="module")
def written(request, tmp_path_factory) -> Path:
    """A folder of checkpoints: what one process, told to use these instructions, writes for all tests that are run."""
    folder = tmp_path_factory.mktemp("as then")
    asked = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    runs = [[*_DIGESTS[name][0], f"--output={folder / name}"] for name in asked]
    command = [sys.executable, "-c", _RUNS, json.dumps(runs)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | _AS_THEN
    finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the digests were made with AVX2"
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "demo" else name for name in _DIGESTS]
)
def test_checkpoints_are_those_of_an_earlier_version(name, written):
    content = (written / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() in _DIGESTS[name][1]
