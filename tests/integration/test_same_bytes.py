"""Checkpoints are, byte for byte, those of an earlier version: a change of results is never an accident.

The digests were made at commit 987d436 with one thread of a CPU with AVX2. Sums come out in another order on other
instruction sets, so newer CPUs are told to use these.
"""

import hashlib

import pytest
import torch

_AS_THEN = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
_DIGESTS = {
    "demo": "0c7ab3175aa12016364c1bd4e9ebdff808e025c645b93bf3ded6ec92c45edae6",
    "golden": "6d21955cd3a84c791a8e5467f4704b68f3441ddf565e5ec36d6ded381e8570ea",
}


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the digests were made with AVX2"
)
@pytest.mark.parametrize("name", _DIGESTS)
def test_checkpoints_are_those_of_an_earlier_version(name, golden_arguments, run_cli, tmp_path):
    quick_start = ["prune", "--pruning.sparsity=0.6", "--evaluate=false", "--report=false"]
    arguments = quick_start if name == "demo" else golden_arguments
    finished = run_cli(*arguments, f"--output={tmp_path / 'out'}", **_AS_THEN)
    assert finished.returncode == 0, finished.stderr
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hashlib.sha256(written).hexdigest() == _DIGESTS[name]
