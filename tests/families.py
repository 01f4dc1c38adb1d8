"""Tiny random models of twenty families of large vision-language models, and inputs for them.

    model = tiny_model("qwen2_vl")
    inputs = make_inputs("qwen2_vl", model, [Sample(before=3, image=0, after=5), Sample(2, 1, 9)], side="left")

A model has four blocks and a vision tower (or an audio tower) of two or three; building one takes a tenth of a second.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lvlm_prune.checkpoints.versions import VERSION_5
from tests import family_configs as configs
from tests.family_configs import AUDIO_TOKEN, IMAGE_TOKEN, VISION_END_TOKEN, VISION_START_TOKEN


@dataclass(frozen=True)
class Sample:
    """One sample: `before` text tokens, the image (or sound) number `image`, `after` text tokens."""

    before: int
    image: int | None
    after: int


@dataclass(frozen=True)
class Family:
    """How to make a model of a family.

    Attributes:
        model: Name of its class in transformers.
        config: Makes its configuration.
        visual: Seeded generator and number of an image to (inputs for that image, number of its placeholder tokens);
            the number is None where only the model knows it.
    """

    model: str
    config: Callable[[], PretrainedConfig]
    visual: Callable[[torch.Generator, int], tuple[dict[str, Tensor], int | None]]


def _pixels(name: str, placeholders: int, *leading: int) -> Callable[[torch.Generator, int], tuple[dict, int]]:
    """One 16 x 16 image under the input `name`, with more dimensions before its own."""
    return lambda generator, image: (
        {name: torch.randn(*leading, 1, 3, 16, 16, generator=generator)},
        placeholders,
    )


def _any_resolution(generator: torch.Generator, image: int) -> tuple[dict[str, Tensor], None]:
    """A base patch and a grid of patches; every second image is wide, so that rows of its padding are dropped."""
    pixels = torch.randn(1, 5, 3, 16, 16, generator=generator)
    if image % 2 == 0:
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}, None
    pixels[:, 3:] = 0
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 32]])}, None


def _grid(generator: torch.Generator, image: int, frames: int = 2) -> tuple[dict[str, Tensor], int]:
    """Flattened patches of an image of one of three sizes, merged two by two."""
    height, width = [(4, 4), (4, 6), (8, 4)][image % 3]
    patches = torch.randn(height * width, 3 * frames * 16, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, width]])}, height * width // 4


def _grid_of_single_frames(generator: torch.Generator, image: int) -> tuple[dict[str, Tensor], int]:
    inputs, placeholders = _grid(generator, image, frames=1)
    return {**inputs, "image_merge_sizes": torch.tensor([2])}, placeholders


def _tiles(generator: torch.Generator, image: int) -> tuple[dict[str, Tensor], int]:
    inputs = {
        "pixel_values": torch.randn(1, 1, 2, 3, 16, 16, generator=generator),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
    }
    return inputs, 1


def _sound(generator: torch.Generator, image: int) -> tuple[dict[str, Tensor], int]:
    inputs = {
        "input_features": torch.randn(1, 8, 32, generator=generator),
        "feature_attention_mask": torch.ones(1, 32, dtype=torch.long),
    }
    return inputs, 8


_LLAVA_NEXT = "LlavaNextForConditionalGeneration"

FAMILIES: dict[str, Family] = {
    "llava": Family("LlavaForConditionalGeneration", configs.llava, _pixels("pixel_values", 16)),
    "llava_next_llama": Family(_LLAVA_NEXT, lambda: configs.llava_next("llama"), _any_resolution),
    "llava_next_mistral": Family(_LLAVA_NEXT, lambda: configs.llava_next("mistral"), _any_resolution),
    "llava_next_mistral_window": Family(
        _LLAVA_NEXT, lambda: configs.llava_next("mistral", sliding_window=8), _any_resolution
    ),
    "llava_next_video": Family("LlavaNextVideoForConditionalGeneration", configs.llava_next_video, _any_resolution),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", configs.llava_onevision, _any_resolution),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", configs.qwen2_vl, _grid),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", configs.qwen2_5_vl, _grid),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", configs.qwen3_vl, _grid),
    "qwen2_5_omni": Family("Qwen2_5OmniThinkerForConditionalGeneration", configs.qwen2_5_omni, _grid),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerForConditionalGeneration", configs.qwen3_omni_moe, _grid),
    "internvl": Family("InternVLForConditionalGeneration", configs.internvl, _pixels("pixel_values", 4)),
    "gemma3": Family("Gemma3ForConditionalGeneration", configs.gemma3, _pixels("pixel_values", 4)),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration", lambda: configs.idefics3("Idefics3Config"), _pixels("pixel_values", 4, 1)
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration", lambda: configs.idefics3("SmolVLMConfig"), _pixels("pixel_values", 4, 1)
    ),
    "paligemma": Family("PaliGemmaForConditionalGeneration", configs.paligemma, _pixels("pixel_values", 16)),
    "mllama": Family("MllamaForConditionalGeneration", configs.mllama, _tiles),
    "video_llama_3": Family("VideoLlama3ForConditionalGeneration", configs.video_llama_3, _grid_of_single_frames),
    "video_llava": Family(
        "VideoLlavaForConditionalGeneration", configs.video_llava, _pixels("pixel_values_images", 16)
    ),
    "qwen2_audio": Family("Qwen2AudioForConditionalGeneration", configs.qwen2_audio, _sound),
}

# Which families take a mask of their image tokens, and what they call it.
_TYPE_MASKS = {
    "qwen2_vl": "mm_token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "gemma3": "token_type_ids",
    "paligemma": "token_type_ids",
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the family, in eval mode and without gradients; the same weights at every call."""
    return copy.deepcopy(_model(family)).to(dtype)


@functools.cache
def _model(family: str) -> PreTrainedModel:
    """The one of which all are copies: to draw its weights takes longer than most tests with it."""
    config = FAMILIES[family].config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, FAMILIES[family].model)(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            # Gates and norm gains that start at zero would hide what lies behind them.
            if parameter.numel() and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def make_inputs(
    family: str, model: PreTrainedModel, samples: list[Sample], side: str = "right"
) -> dict[str, torch.Tensor]:
    """Model inputs for a batch of samples, padded on `side`, in the dtype of the model; the same at every call."""
    rows, visuals = [], []
    for row, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(row)
        text = torch.randint(3, 99, (sample.before + sample.after,), generator=generator).tolist()
        placeholders: list[int] = []
        if sample.image is not None:
            visual, count = _visual(family, model, sample.image)
            visuals.append(visual)
            placeholders = _placeholder_tokens(family, count)
        rows.append([*text[: sample.before], *placeholders, *text[sample.before :]])

    length = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([_padded(row, length, side) for row in rows]),
        "attention_mask": torch.tensor([_padded([1] * len(row), length, side) for row in rows]),
    }
    for name in visuals[0] if visuals else ():
        inputs[name] = torch.cat([visual[name] for visual in visuals])
    if _TYPE_MASKS.get(family) in inspect.signature(model.forward).parameters:
        inputs[_TYPE_MASKS[family]] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    if family == "mllama" and visuals:
        inputs["cross_attention_mask"] = _after_the_image(inputs["input_ids"])
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _padded(row: list[int], length: int, side: str) -> list[int]:
    padding = [0] * (length - len(row))
    return padding + row if side == "left" else row + padding


def _visual(family: str, model: PreTrainedModel, image: int) -> tuple[dict[str, Tensor], int]:
    inputs, count = FAMILIES[family].visual(torch.Generator().manual_seed(100 + image), image)
    if count is None:
        cast = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        count = sum(map(len, _image_features(model.model, cast)))
    return inputs, count


def _image_features(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Features of each image of many resolutions, without those of its padding."""
    if VERSION_5:
        return model.get_image_features(**inputs, return_dict=True).pooler_output
    return model.get_image_features(**inputs)


def _placeholder_tokens(family: str, count: int) -> list[int]:
    if family == "qwen2_audio":
        return [AUDIO_TOKEN] * count
    if "omni" in family:
        return [VISION_START_TOKEN, *[IMAGE_TOKEN] * count, VISION_END_TOKEN]
    return [IMAGE_TOKEN] * count


def _after_the_image(input_ids: Tensor) -> Tensor:
    """Cross-attention mask (B, S, images, tiles): tokens before the image do not see it."""
    seen = (input_ids == IMAGE_TOKEN).long().cummax(dim=1).values
    return seen[:, :, None, None].expand(-1, -1, 1, 2).contiguous()
