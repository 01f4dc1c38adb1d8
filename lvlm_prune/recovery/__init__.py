"""Recovery: giving back accuracy that pruning took, with zeros that stay zeros.

Importing this package does not import peft; its classes that need it are loaded when they are asked for.
"""

from typing import Any

from lvlm_prune.recovery.masked_lora import Gradient, masked_lora_linear, masked_weight

__all__ = [
    "Gradient",
    "SparseLoraLinear",
    "load_sparse_adapter",
    "masked_lora_linear",
    "masked_weight",
    "save_sparse_adapter",
    "sparse_lora_config",
]


def __getattr__(name: str) -> Any:
    """What stands on peft, without paying for its import where it is not used."""
    if name in ("SparseLoraLinear", "sparse_lora_config"):
        from lvlm_prune.recovery import adapter_layer

        return getattr(adapter_layer, name)
    if name in ("load_sparse_adapter", "save_sparse_adapter"):
        from lvlm_prune.recovery import adapter_folder

        return getattr(adapter_folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
