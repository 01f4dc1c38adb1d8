"""A stand-in for vision towers of timm, which needs torchvision: one convolution in place of the tower.

The towers are not what is checked; the decoder blocks behind them are.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


class ConvolutionTower(nn.Module):
    """Patches of 4 x 4 pixels, as a grid or as a sequence with a class token in front."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.is_sequence = getattr(config, "architecture", "") == "resnet50"
        self.convolution = nn.Conv2d(3, getattr(config, "hidden_size", None) or 32, 4, 4)

    def post_init(self) -> None:
        """Nothing to do; transformers calls it."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Features of the patches."""
        hidden = self.convolution(pixel_values)
        if not self.is_sequence:
            return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean((2, 3)))
        hidden = nn.functional.pad(hidden.flatten(2).transpose(1, 2), (0, 0, 1, 0))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0])


def install() -> None:
    """Make `AutoModel.from_config` build it wherever a configuration asks for a tower of timm."""
    original = transformers.AutoModel.from_config.__func__

    def from_config(cls: Any, config: Any = None, **options: Any) -> nn.Module:
        if "timm" in type(config).__name__.lower() or config.model_type == "gemma3n_vision":
            return ConvolutionTower(config)
        return original(cls, config, **options)

    transformers.AutoModel.from_config = classmethod(from_config)
