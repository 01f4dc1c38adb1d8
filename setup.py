"""The C++ kernels of packed models. Where they cannot be built, the package works without them, in plain torch."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """A shared library with C functions, not a Python module."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


KERNELS = Extension(
    "lvlm_prune.packed.kernels._packed",
    sources=["lvlm_prune/packed/kernels/packed.cpp"],
    depends=[f"lvlm_prune/packed/kernels/{name}.h" for name in ("common", "plain", "avx2", "avx512")],
    language="c++",
    # No errno and no traps: nothing here reads them. Nothing is linked but the C++ library.
    extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)

setup(ext_modules=[KERNELS], cmdclass={"build_ext": BuildKernels})
