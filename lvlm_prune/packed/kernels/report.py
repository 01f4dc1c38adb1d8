"""Which kernels this machine has, in words."""


def kernel_report() -> str:
    """One line for `lvlm-prune --version`."""
    return "packed kernels: plain torch"
