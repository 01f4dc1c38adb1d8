"""The picture behind the visual tokens of one sample, as the vision tower sees it, where the tokens' places are known.

    pixel_values (1, 3, H, W), g * g tokens         one token per cell of a g x g grid (LLaVA 1.5, Gemma 3, PaliGemma)
    pixel_values (patches, C * t * p * p) and       patches in windows of merge x merge, one token per window
    image_grid_thw (1, 3)                           (Qwen2-VL and later, GLM-4V)

    pixel_values (1, tiles, 3, H, W) and            the first tile is the whole image, one token per patch; those of the
    image_sizes (1, 2), more than g * g tokens      others have row ends between them (LLaVA-NeXT, LLaVA-OneVision)

Everything is read off the inputs and the configuration. Several images or videos have no such grid: their tokens are
not drawn, nor are those of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_LARGEST = 512


@dataclass(frozen=True)
class Picture:
    """What one sample shows.

    Args:
        sample: Number of the sample in the whole calibration set.
        image: The picture, at most 512 pixels wide and high.
        grid: Rows and columns of its (first) visual tokens, which cover it evenly in reading order.
    """

    sample: int
    image: Image.Image
    grid: tuple[int, int]


def picture_of(inputs: Mapping[str, Tensor], row: int, sample: int, visual_tokens: int, config: Any) -> Picture | None:
    """The picture of one row of a batch; None where its tokens have no grid that is known.

    Args:
        inputs: Model inputs of the batch.
        row: The row.
        sample: Number of its sample.
        visual_tokens: Number of its visual tokens.
        config: Configuration of the model.
    """
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    rows = len(inputs["input_ids"])
    if pixels is None or not visual_tokens:
        return None
    if sizes is not None:
        if pixels.ndim != 2 or len(sizes) != rows:
            return None
        return _from_patches(pixels, sizes.tolist(), row, sample, visual_tokens, getattr(config, "vision_config", None))
    if "image_sizes" in inputs:
        return _whole_image(inputs, row, sample, visual_tokens, config)
    side = math.isqrt(visual_tokens)
    one_square_each = pixels.ndim == 4 and len(pixels) == rows and pixels.shape[2] == pixels.shape[3]
    if side * side != visual_tokens or not one_square_each:
        return None
    return Picture(sample, _to_image(pixels[row]), (side, side))


def _whole_image(
    inputs: Mapping[str, Tensor], row: int, sample: int, visual_tokens: int, config: Any
) -> Picture | None:
    """The first tile of an image of any resolution, where each sample has exactly one image."""
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    tower = getattr(config, "vision_config", None)
    size, patch = getattr(tower, "image_size", 0), getattr(tower, "patch_size", 0)
    token = getattr(config, "image_token_id", None)
    if not patch or token is None or pixels.ndim != 5 or len(inputs["image_sizes"]) != len(ids):
        return None
    side = size // patch
    if not (ids == token).any(dim=1).all() or pixels.shape[-1] != size or visual_tokens < side * side:
        return None
    return Picture(sample, _to_image(pixels[row, 0]), (side, side))


def _from_patches(
    pixels: Tensor, sizes: list[list[int]], row: int, sample: int, visual_tokens: int, config: Any
) -> Picture | None:
    patch, merge = getattr(config, "patch_size", 0), getattr(config, "spatial_merge_size", 0)
    frames, height, width = sizes[row]
    if not (patch and merge) or frames != 1 or height * width != visual_tokens * merge * merge:
        return None
    start = sum(math.prod(size) for size in sizes[:row])
    own = pixels[start : start + height * width]
    if own.shape[1] % (3 * patch * patch):
        return None
    windows = own.reshape(height // merge, width // merge, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
    image = windows.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * patch, width * patch)
    return Picture(sample, _to_image(image), (height // merge, width // merge))


def _to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) of any range, which normalisation for the vision tower left, as a picture."""
    values = pixels.detach().float().cpu()
    low, high = values.min(), values.max()
    steps = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    image = Image.fromarray(steps.permute(1, 2, 0).numpy())
    image.thumbnail((_LARGEST, _LARGEST))
    return image
