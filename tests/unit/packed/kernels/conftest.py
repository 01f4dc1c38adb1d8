"""Every instruction set that this machine has."""

import pytest

from lvlm_prune.packed.kernels.native import Level, limited_to


@pytest.fixture(params=["torch", "plain", "avx2", "avx512"])
def kernels(request):
    """Run the test with this instruction set, where this machine and this build have it."""
    with limited_to(request.param) as level:
        if level != Level[request.param.upper()]:
            pytest.skip(f"needs {request.param}; here is {level.name.lower()}")
        yield level
