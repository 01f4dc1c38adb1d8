"""The GPU kernels without a GPU: Triton's interpreter runs them, and its compiler makes machine code of them."""

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="the GPU kernels need Triton, which is not installed")


@pytest.mark.slow
def test_products_are_those_of_the_dense_matrix():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.unit.packed.kernels.triton_interpreted"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["vector_kernel", "matrix_kernel", "unpack_kernel"])
def test_each_kernel_compiles_to_machine_code(kernel, architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lvlm_prune.packed.kernels import gpu, triton_kernels

    constants = {"CHUNK": triton_kernels.CHUNK, "ROWS": gpu.ROWS[kernel.split("_")[0]]}
    if kernel != "unpack_kernel":
        constants |= {"TOKENS": 4 if kernel == "vector_kernel" else 16, "HAS_BIAS": True}
    if kernel == "matrix_kernel":
        constants |= {"FLOAT": False}
    function = getattr(triton_kernels, kernel)
    pointers = {"x": "*bf16", "values": "*bf16", "bias": "*bf16", "y": "*bf16", "dense": "*bf16"}
    types = dict.fromkeys(function.arg_names, "i32") | pointers | {"mask": "*i32", "start": "*i32"}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
    if kernel == "matrix_kernel":
        assert "mma" in compiled.asm["ptx"]
