"""Packed weights lie in huge pages, where the system has some."""

import re
from pathlib import Path

import pytest
import torch

from lvlm_prune.packed.kernels import PackedMatrix, cpu

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mapping in which a tensor lies."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() + 2**21 < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def fallbacks() -> str:
    """How often the system had no huge page to give."""
    return re.search(r"^thp_fault_fallback (.*)$", Path("/proc/vmstat").read_text(), re.MULTILINE)[1]


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no huge pages")
def test_a_large_matrix_lies_in_huge_pages():
    dense = torch.randn(2048, 8192).bfloat16()
    dense[:, ::2] = 0
    if not cpu.usable(dense):
        pytest.skip("no kernels are built")
    before = fallbacks()
    matrix = PackedMatrix.from_dense(dense)
    if fallbacks() != before:
        pytest.skip("what memory is free is in small pieces")
    assert huge_bytes(matrix.values) > 0.5 * matrix.values.nbytes
    assert torch.equal(matrix.to_dense(), dense)
