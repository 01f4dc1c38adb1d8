"""Which kernels this machine has, in words."""

from lvlm_prune.packed.kernels.native import FORCE, Level, level, library

NAMES = {Level.PLAIN: "plain C++", Level.AVX2: "AVX2", Level.AVX512: "AVX-512 (VBMI2)"}


def kernel_report() -> str:
    """What `lvlm-prune kernels` prints: which kernels for packed weights are used here."""
    if library() is None:
        return "packed kernels: plain torch, slower than dense (the C++ kernels were not built when this was installed)"
    if level() == Level.TORCH:
        return f"packed kernels: plain torch, as {FORCE} asks for"
    return f"packed kernels: {NAMES[level()]}"
