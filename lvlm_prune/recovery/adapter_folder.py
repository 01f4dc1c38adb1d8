"""The adapter on disk: PEFT's own two files, and a third one that binds them to the zeros of their base.

    adapter_config.json           PEFT's
    adapter_model.safetensors     PEFT's
    sparse_adapter.json           ours: a digest of the zeros of every Linear that the adapter was trained on

Plain PEFT can load the first two onto anything, and merging would then revive pruned weights. Load them with
`load_sparse_adapter`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict

import numpy as np
from torch import Tensor, nn

from lvlm_prune.errors import InputError, first_line
from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.reading import conforms
from lvlm_prune.output.temporary import temporary_folder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from lvlm_prune.recovery.masked_lora import Gradient

MARKER_NAME = "sparse_adapter.json"
_PEFT_PREFIX = "base_model.model."
_CONFIG_NAME, _WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


class _Marker(TypedDict, total=False):
    mask_bound: bool
    note: str
    gradient: Required[str]
    masks: Required[dict[str, str]]


def mask_digest(weight: Tensor) -> str:
    """SHA-256 of where a weight is zero, and of its shape.

    Example:
        >>> import torch
        >>> mask_digest(torch.tensor([[0.0, 1.0]])) == mask_digest(torch.tensor([[-0.0, 7.0]]))
        True
    """
    zero = (weight.detach() == 0).cpu().numpy()
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + np.packbits(zero).tobytes()).hexdigest()


def save_sparse_adapter(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, str],
    gradient: Gradient = "exact",
    base: str | None = None,
) -> None:
    """Write an adapter in PEFT's format, with the marker that it belongs to these zeros.

    Args:
        folder: Where to write; made if it is not there.
        config: PEFT's configuration of the adapter.
        tensors: As `get_peft_model_state_dict` gives them, for example `model.layers.0.mlp.up_proj.lora_A.weight`.
        masks: Path of each adapted Linear in the model -> `mask_digest` of its weight.
        gradient: What the adapter was trained with; loading it trains on with the same.
        base: Folder or hub id of the checkpoint that it belongs to, as PEFT notes it.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = base or config.base_model_name_or_path
    with temporary_folder() as place:  # PEFT would write through what may be a link to somebody's file
        config.save_pretrained(str(place))
        replace_durably(folder / _CONFIG_NAME, (place / _CONFIG_NAME).read_bytes())
    named = {_PEFT_PREFIX + name.removeprefix(_PEFT_PREFIX): tensor.cpu() for name, tensor in tensors.items()}
    replace_durably(folder / _WEIGHTS_NAME, save({k: v.contiguous() for k, v in named.items()}))
    marker = {
        "mask_bound": True,
        "note": "Load with lvlm_prune.recovery.load_sparse_adapter; plain PEFT would revive pruned weights.",
        "gradient": gradient,
        "masks": dict(masks),
    }
    replace_durably(folder / MARKER_NAME, (json.dumps(marker, indent=1) + "\n").encode())


def load_sparse_adapter(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the pruned model that it was trained on.

    Args:
        model: The pruned transformers model, in any floating dtype.
        folder: What `save_sparse_adapter` (and `lvlm-prune recover`, as `adapter/`) wrote.
        is_trainable: Whether the adapter is going to be trained on.

    Returns:
        A `PeftModel`; its `merge_and_unload()` leaves every pruned weight at +0.0.

    Raises:
        InputError: The folder holds no such adapter, or `model` is not its base.
    """
    from peft import LoraConfig, PeftModel

    from lvlm_prune.recovery.adapter_layer import sparse_lora_config

    folder = Path(folder)
    marker = _read_marker(folder)
    modules = dict(model.named_modules())
    for name, digest in marker["masks"].items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise InputError("adapter", folder, f"belongs to another base: this model has no Linear {name}")
        if mask_digest(linear.weight) != digest:
            raise InputError("adapter", folder, f"belongs to another base: {name} has its zeros in other places")
    _refuse_incomplete(folder, marker["masks"])
    try:
        saved: Any = LoraConfig.from_pretrained(str(folder))
        saved._custom_modules = sparse_lora_config(marker["gradient"])._custom_modules
        return PeftModel.from_pretrained(model, str(folder), config=saved, is_trainable=is_trainable)
    except MemoryError:
        raise
    except Exception as error:  # of PEFT, about files that somebody changed
        raise InputError("adapter", folder, f"PEFT cannot load it ({first_line(error)})") from error


def _refuse_incomplete(folder: Path, masks: Mapping[str, str]) -> None:
    """Refuse an adapter that lacks matrices: PEFT would leave those Linears as they are, and only warn."""
    from safetensors import SafetensorError, safe_open

    for name in (_CONFIG_NAME, _WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise InputError("adapter", folder, f"has no {name}")
    try:
        with safe_open(folder / _WEIGHTS_NAME, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        problem = f"{_WEIGHTS_NAME} is truncated or not a safetensors file ({first_line(error)})"
        raise InputError("adapter", folder, problem) from None
    for name in masks:
        for part in ("lora_A", "lora_B"):
            if f"{_PEFT_PREFIX}{name}.{part}.weight" not in keys:
                raise InputError("adapter", folder, f"{_WEIGHTS_NAME} lacks {part} of {name}")


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER_NAME).read_text())
    except OSError:
        raise InputError("adapter", folder, f"has no {MARKER_NAME}: not an adapter that `recover` wrote") from None
    except (ValueError, RecursionError):
        raise InputError("adapter", folder, f"its {MARKER_NAME} cannot be read") from None
    if not conforms(marker, _Marker):
        raise InputError("adapter", folder, f"its {MARKER_NAME} cannot be read")
    return marker
