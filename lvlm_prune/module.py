"""The model that is pruned or recovered, as a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from lvlm_prune.blocks import (
    BlockRunner,
    CheckpointFolder,
    ResidentWeights,
    StreamedWeights,
    Weights,
    build_skeleton,
    prunable_linears,
    resolve,
)


class LVLMModule(L.LightningModule):
    """A large vision-language model in a Hugging Face checkpoint folder, one decoder block in memory at a time.

    Args:
        path: Local checkpoint folder, hub id, or `demo` for the embedded model. Weights in safetensors only.
        dtype: Precision in which blocks run; `auto` takes the checkpoint's own. Weights are written as they are stored.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run modelling code that comes with the checkpoint.
        attn_implementation: Attention implementation of transformers, for example `sdpa` or `eager`; default: its own
            choice.
    """

    def __init__(
        self,
        path: str = "demo",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str = "main",
        trust_remote_code: bool = False,
        attn_implementation: str = "",
    ) -> None:
        super().__init__()
        self.path, self.dtype_option, self.revision = path, dtype, revision
        self.trust_remote_code, self.attn_implementation = trust_remote_code, attn_implementation
        self.folder: CheckpointFolder | None = None
        self.model: Any = None
        self.processor: Any = None
        self.runner: BlockRunner

    @classmethod
    def from_model(cls, model: nn.Module, processor: Any = None) -> LVLMModule:
        """Wrap a transformers model that is already in memory; pruning then changes it in place.

        Args:
            model: A transformers image-text-to-text model.
            processor: Its processor; not needed where the calibration source gives ready-made inputs.
        """
        module = cls(path=str(getattr(model, "name_or_path", "") or type(model).__name__))
        module.model = model.eval().requires_grad_(False)
        module.processor = processor
        module.runner = BlockRunner(model)
        return module

    @property
    def label(self) -> str:
        """Short name of the model for what is printed and for the default output folder."""
        return Path(self.path).name or "model"

    def open(self) -> None:
        """Find the checkpoint and build the model on the meta device; no weights are read.

        Raises:
            InputError: The folder, its files or its architecture cannot be used.
        """
        if self.model is not None:
            return
        self.folder = CheckpointFolder(resolve(self.path, None if self.revision == "main" else self.revision))
        dtype = "auto" if self.dtype_option == "auto" else getattr(torch, self.dtype_option)
        self.model = build_skeleton(
            self.folder,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation or None,
        )
        self.runner = BlockRunner(self.model)

    def linears(self) -> dict[str, nn.Linear]:
        """Full name of every Linear of the decoder blocks that could be pruned, in the order of the blocks."""
        return {
            f"{self.runner.name(index)}.{name}": linear
            for index in range(len(self.runner))
            for name, linear in prunable_linears(self.runner.block(index)).items()
        }

    def weights(self, device: torch.device) -> Weights:
        """How blocks come into memory: streamed from the checkpoint, or already there."""
        if self.folder is None:
            return ResidentWeights()
        return StreamedWeights(self.model, self.runner.decoder, self.folder, device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision in which blocks run."""
        return next(self.runner.block(0).parameters()).dtype
