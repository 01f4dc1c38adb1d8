"""Image inputs for a model of any family, found by trying the forms in which processors hand images to models.

a form fits  <=>  the model takes it, makes n features of it, and its answer changes when the pixels do
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

_TOKEN_INPUTS = {
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
    "moe_mm_token_type_ids",
    "qformer_input_ids",
    "image_embeds_position_mask",
    "image_attention_mask",
    "cross_attention_mask",
}
_TYPE_MASKS: list[tuple[str, ...]] = [
    (),
    ("mm_token_type_ids",),
    ("token_type_ids",),
    ("mm_token_type_ids", "moe_mm_token_type_ids"),
]
# What models raise when they are given something that they do not take.
REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _positions(height: int, width: int) -> Tensor:
    """(column, row) of each patch, (1, height * width, 2)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows], dim=-1).reshape(1, height * width, 2)


def forms(model: nn.Module, seed: int) -> Iterator[Inputs]:
    """Random images in every form; those that have a grid are of one of three sizes, as `seed` says."""
    config = getattr(model.config, "vision_config", None) or getattr(model.config, "vlm_config", None) or model.config
    patch = _first(getattr(config, "patch_size", 4) or 4)
    side = _first(getattr(config, "image_size", 16) or 16)
    channels = getattr(config, "num_channels", getattr(config, "in_channels", 3)) or 3
    own_frames = getattr(config, "temporal_patch_size", None) or getattr(config, "patch_temporal", None) or 1
    height, width = [(4, 4), (4, 8), (8, 4)][seed % 3]
    patches, flat = height * width, 3 * patch * patch
    grid, pixels = torch.tensor([[1, height, width]]), _normal(seed, 1, 3, side, side)
    square = {"image_sizes": torch.tensor([[side, side]])}

    for frames in dict.fromkeys((own_frames, 2, 1)):
        volume = channels * frames * patch * patch
        for name in ("image_grid_thw", "grid_thw", "image_grid_hws", "image_grid_hw"):
            sizes = {name: grid if "thw" in name else grid[:, 1:]}
            yield {"pixel_values": _normal(seed, patches, volume), **sizes}
            yield {"pixel_values": _normal(seed, patches, channels, patch, patch), **sizes}
            yield {"pixel_values": _normal(seed, 1, patches, volume), **sizes}
        merged = {"image_grid_thw": grid, "image_merge_sizes": torch.tensor([2])}
        yield {"pixel_values": _normal(seed, patches, volume), **merged}
    yield {"pixel_values": pixels, **square}
    yield {"pixel_values": pixels}
    for high in (64, side):
        yield {"pixel_values": pixels, "high_res_pixel_values": _normal(seed + 50, 1, 3, high, high)}
    places = {"image_position_ids": _positions(height, width)}
    yield {"pixel_values": _normal(seed, 1, patches, flat).sigmoid(), **places}
    whole = {"pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.bool)}
    yield {"pixel_values": pixels[:, None], **whole, "tile_fine_mask": torch.ones(1, 1, dtype=torch.bool)}
    yield {"pixel_values": pixels[:, None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    large = channels * patch * patch
    yield {"pixel_values": _normal(seed, 64, large), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    for tiles in (1, 2):
        yield {"pixel_values": _normal(seed, 1, tiles, 3, side, side), **square}
    yield {"pixel_values": pixels[:, None]}
    yield {"pixel_values": pixels[:, None], **whole}
    yield {"pixel_values": _normal(seed, 1, 5, 3, side, side), "image_sizes": torch.tensor([[2 * side, 2 * side]])}
    real = {"pixel_attention_mask": torch.ones(1, patches, dtype=torch.long)}
    yield {"pixel_values": _normal(seed, 1, patches, flat), "spatial_shapes": torch.tensor([[height, width]]), **real}
    for name in ("image_position_ids", "pixel_position_ids"):
        yield {"pixel_values": _normal(seed, 1, patches, flat), name: _positions(height, width)}
    strip = _normal(seed, 1, 3, patch, patch * patches)
    yield {"pixel_values": strip, "target_sizes": torch.tensor([[height, width]], dtype=torch.int32)}
    yield {"pixel_values": pixels, "num_local_patches": torch.tensor([0])}
    yield {"pixel_values": _normal(seed, 1, patches, 4 * flat).sigmoid(), **places}
    pooling = {"image_token_pooling": torch.arange(16).view(4, 4), "image_grids": torch.tensor([[2, 2, 0, 0]])}
    yield {"pixel_values": _normal(seed, 1, 16, flat), **pooling}
    nested = {**pooling, "image_token_pooling": pooling["image_token_pooling"][None]}
    yield {"pixel_values": _normal(seed, 1, 1, 16, flat), **nested}
    yield {"pixel_values": _normal(seed, 4, 2, 4, 4, 3)}
    yield {"pixel_values": _normal(seed, 1, patches, flat)}
    yield {"pixel_values": _normal(seed, 1, 3, 64, 64)}
    yield {"pixel_values": _normal(seed, 1, 3, 64, 64), "image_sizes": torch.tensor([[64, 64]])}
    merged = {"image_grid_thw": torch.tensor([[1, height // 2, width // 2]])}
    yield {"pixel_values": _normal(seed, patches, flat), **merged}


def _first(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


@torch.no_grad()
def image_samples(model: nn.Module, count: int = 3) -> list[Inputs]:
    """`count` samples of one image and a few text tokens each, in the family's own form or the first that fits.

    Raises:
        ValueError: No form fits.
    """
    own_form = _OWN_FORMS.get(model.config.model_type)
    if own_form is not None:
        return [own_form(sample) for sample in text_samples(count)]
    first_seed = 0
    for number, image in enumerate(forms(model, first_seed)):
        try:
            features = _count_features(model, image)
        except REFUSALS:
            continue
        for masks in _TYPE_MASKS:
            inputs = _sample(model, image, features, first_seed, masks)
            try:
                changed = not torch.equal(
                    _answer(model, inputs), _answer(model, {**inputs, "pixel_values": -inputs["pixel_values"]})
                )
            except REFUSALS:
                continue
            if changed:
                return [_sample_of_form(model, number, masks, seed) for seed in range(count)]
    raise ValueError("takes images in none of the usual forms")


def _sample_of_form(model: nn.Module, number: int, masks: tuple[str, ...], seed: int) -> Inputs:
    """A sample with another image; where the family refuses its size, the size of the first."""
    for size in (seed, 3 * seed):
        image = list(forms(model, size))[number]
        try:
            inputs = _sample(model, image, _count_features(model, image), seed, masks)
            _answer(model, inputs)
        except REFUSALS:
            continue
        return inputs
    raise ValueError(f"takes the first image, but not image {seed}")


def _answer(model: nn.Module, inputs: Inputs) -> Tensor:
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def _count_features(model: nn.Module, image: Inputs) -> int:
    """Number of placeholder tokens that the image needs; some families put its features beside the text."""
    owners = (getattr(model, "model", None), model)
    function: Any = next((f for owner in owners if (f := getattr(owner, "get_image_features", None))), None)
    taken = {} if function is None else inspect.signature(function).parameters
    known = inspect.signature(type(model).forward).parameters
    if any(name not in taken and name not in known for name in image):
        raise TypeError("inputs that the model does not know")
    if function is None:
        return 0
    arguments = {name: value for name, value in image.items() if name in taken}
    try:
        return _rows(function(**arguments, return_dict=True))
    except TypeError:
        return _rows(function(**arguments))


def _rows(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, (tuple, list)):
        return sum(map(_rows, features))
    deep = getattr(features, "deepstack_features", None)
    if deep and isinstance(deep[0][0], int):  # (block, features) pairs in place of features at the input
        return _rows(deep[0][1])
    pooled = getattr(features, "pooler_output", None)
    return _rows(features.last_hidden_state if pooled is None else pooled)


def _token(model: nn.Module, *names: str) -> list[int]:
    """The first of these token ids that the configuration gives, or none."""
    return [value for name in names if isinstance(value := getattr(model.config, name, None), int)][:1]


def _sample(model: nn.Module, image: Inputs, features: int, seed: int, masks: tuple[str, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(1000 + seed)
    text = torch.randint(30, 66, (9,), generator=generator).tolist()
    before = 2 + seed
    placeholder = _token(model, "image_token_id", "image_token_index", "image_patch_id", "im_patch_id")
    if masks and not placeholder:
        raise ValueError("no token to mask")
    row = [
        *text[:before],
        *_token(model, "vision_start_token_id", "image_start_token_id", "boi_token_id"),
        *placeholder * features,
        *_token(model, "vision_end_token_id", "image_end_token_id", "eoi_token_id"),
        *text[before:],
    ]
    input_ids = torch.tensor([row])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **image}
    return inputs | {name: (input_ids == placeholder[0]).long() for name in masks}


def text_samples(count: int = 3) -> list[Inputs]:
    """Samples of 13, 9 and 17 text tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 90, (1, length), generator=generator) for length in (13, 9, 17)[:count]]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def _with_queries(inputs: Inputs, frames: int = 0, instruction: bool = False) -> Inputs:
    """Four placeholders for the four queries that look at the image."""
    input_ids = inputs["input_ids"].clone()
    input_ids[:, :4] = 100
    pixels = _normal(input_ids.shape[1], 1, 3, 16, 16)
    inputs = {**inputs, "input_ids": input_ids, "pixel_values": pixels}
    if frames:
        inputs["pixel_values"] = pixels[:, None].repeat(1, frames, 1, 1, 1)
    if instruction:
        inputs["qformer_input_ids"] = torch.full((1, 4), 7)
    return inputs


def _with_marked_image(inputs: Inputs, image: Inputs) -> Inputs:
    marked = torch.zeros_like(inputs["input_ids"])
    marked[:, :4] = 1
    return {**inputs, **image, "image_embeds_position_mask": marked}


def _with_cross_attention(inputs: Inputs) -> Inputs:
    tokens = inputs["input_ids"].shape[1]
    seen = torch.ones(1, tokens, 1, dtype=torch.long)
    return {**inputs, "pixel_values": _normal(tokens, 1, 1, 3, 16, 16), "image_attention_mask": seen}


def _with_tiles(inputs: Inputs) -> Inputs:
    """One image of one tile out of four, which all tokens but the first see."""
    tokens = inputs["input_ids"].shape[1]
    tile = torch.tensor([1, 0, 0, 0])
    return {
        **inputs,
        "pixel_values": _normal(tokens, 1, 1, 4, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": tile.view(1, 1, 4),
        "cross_attention_mask": tile * (torch.arange(tokens) > 0).long().view(1, tokens, 1, 1),
    }


def _with_protein(inputs: Inputs) -> Inputs:
    protein = torch.randint(5, 90, (1, 6), generator=torch.Generator().manual_seed(inputs["input_ids"].shape[1]))
    return {**inputs, "protein_input_ids": protein, "protein_attention_mask": torch.ones_like(protein)}


def _pixels(inputs: Inputs) -> Inputs:
    return {"pixel_values": _normal(inputs["input_ids"].shape[1], 1, 3, 16, 16)}


def _flattened_patches(inputs: Inputs) -> Inputs:
    """Each patch behind its row and its column."""
    patches = _normal(inputs["input_ids"].shape[1], 1, 16, 2 + 32)
    patches[..., 0], patches[..., 1] = torch.arange(16) // 4, torch.arange(16) % 4
    return {"flattened_patches": patches}


# Families that take an image (or a protein) in a form of their own.
_OWN_FORMS: dict[str, Callable[[Inputs], Inputs]] = {
    "blip-2": _with_queries,
    "instructblip": lambda inputs: _with_queries(inputs, instruction=True),
    "instructblipvideo": lambda inputs: _with_queries(inputs, frames=4, instruction=True),
    "kosmos-2": lambda inputs: _with_marked_image(inputs, _pixels(inputs)),
    "kosmos-2.5": lambda inputs: _with_marked_image(inputs, _flattened_patches(inputs)),
    "idefics": _with_cross_attention,
    "mllama": _with_tiles,
    "evolla": _with_protein,
}


def padded(samples: list[Inputs], side: str) -> Inputs:
    """One batch of samples, padded on `side`.

    Raises:
        RuntimeError: Their images are of different shapes.
    """
    length = max(sample["input_ids"].shape[1] for sample in samples)
    batch: Inputs = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if name in _TOKEN_INPUTS and first.shape[1] == samples[0]["input_ids"].shape[1]:
            batch[name] = torch.cat([_pad(value, length, side) for value in values])
        elif name == "pixel_values" and "target_sizes" in samples[0]:
            batch[name] = torch.cat(values, dim=-1)  # patches of all images in one strip
        else:
            batch[name] = torch.cat(values)
    return batch


def _pad(value: Tensor, length: int, side: str) -> Tensor:
    missing = value.new_zeros(1, length - value.shape[1], *value.shape[2:])
    return torch.cat([missing, value] if side == "left" else [value, missing], dim=1)
