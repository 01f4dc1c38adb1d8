"""What this machine's processor multiplies fast."""

import functools

import torch


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of a dtype on this processor; float32 takes a fraction of the time where not.

    Example:
        >>> multiplies(torch.float32)
        True
    """
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or bool(supported[dtype]())
