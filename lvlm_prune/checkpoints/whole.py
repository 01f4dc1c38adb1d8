"""A whole model in memory, as transformers loads it; what it says against a checkpoint becomes one line."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.checkpoints.skeleton import unread_generation
from lvlm_prune.errors import InputError, first_line


def load_whole_model(
    like: PreTrainedModel, folder: CheckpointFolder, trust_remote_code: bool, attn_implementation: str | None
) -> PreTrainedModel:
    """The model of a checkpoint folder with its weights, in eval mode and without gradients.

    Args:
        like: The same model without weights; gives class and dtype.
        folder: The checkpoint.
        trust_remote_code: Whether it runs the checkpoint's own code.
        attn_implementation: As transformers takes it; its own choice when None.

    Raises:
        InputError: transformers does not load it.
    """
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    disable_progress_bar()
    try:
        model: PreTrainedModel = type(like).from_pretrained(
            folder.path, dtype=like.dtype, trust_remote_code=trust_remote_code, local_files_only=True, **attention
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of transformers, about files that are read only here
        if trust_remote_code and "auto_map" in folder.config:  # of the checkpoint's own code it may be a bug
            raise
        raise InputError("model.path", folder.path, _why_not_loaded(folder, error)) from error
    return model.eval().requires_grad_(False)


def _why_not_loaded(folder: CheckpointFolder, error: Exception) -> str:
    return unread_generation(folder) or f"transformers cannot load it ({type(error).__name__}: {first_line(error)})"
