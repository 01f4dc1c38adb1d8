"""Tiny random models of twenty families of large vision-language models, and inputs for them.

    model = tiny_model("qwen2_vl")
    inputs = make_inputs("qwen2_vl", model, [Sample(before=3, image=0, after=5), Sample(2, 1, 9)], side="left")

A model has four blocks and a vision tower (or an audio tower) of two or three; building one takes a tenth of a second.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lvlm_prune.checkpoints.versions import VERSION_5

HIDDEN = 32
IMAGE_TOKEN = 100
VIDEO_TOKEN = 101
AUDIO_TOKEN = 102
VISION_START_TOKEN = 103
VISION_END_TOKEN = 104
AUDIO_START_TOKEN = 105

LANGUAGE = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The sections add up to half the size of a head.
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_LANGUAGE = {**LANGUAGE, "rope_parameters": MULTIMODAL_ROPE}
QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START_TOKEN,
    "vision_end_token_id": VISION_END_TOKEN,
}
SMALL_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {
    **SMALL_TOWER,
    "model_type": "clip_vision_model",
    "num_hidden_layers": 3,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 16,
}
SIGLIP = {
    **SMALL_TOWER,
    "model_type": "siglip_vision_model",
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
QWEN_2_5_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN_3_TOWER = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}
OMNI_AUDIO = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "output_dim": HIDDEN,
    "n_window": 10,
    "max_source_positions": 64,
}
ANY_RESOLUTION = [[16, 32], [32, 16], [32, 32]]


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


def _config(class_name: str, **options: Any) -> PretrainedConfig:
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    return getattr(transformers, class_name)(**(options if VERSION_5 else _as_in_version_4(options)))


def _as_in_version_4(options: dict[str, Any]) -> dict[str, Any]:
    """The same options with rotary positions as transformers 4 spells them."""
    options = {name: _as_in_version_4(value) if isinstance(value, dict) else value for name, value in options.items()}
    if rope := dict(options.pop("rope_parameters", {})):
        options |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    return options


def _language(model_type: str, **options: Any) -> dict[str, Any]:
    return {**LANGUAGE, "model_type": model_type, **options}


def _llava() -> PretrainedConfig:
    return _config(
        "LlavaConfig",
        vision_config=CLIP,
        text_config=_language("llama"),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )


def _llava_next(model_type: str, **options: Any) -> PretrainedConfig:
    return _config(
        "LlavaNextConfig",
        vision_config=CLIP,
        text_config=_language(model_type, **options),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=ANY_RESOLUTION,
    )


def _llava_next_video() -> PretrainedConfig:
    return _config(
        "LlavaNextVideoConfig",
        vision_config=CLIP,
        text_config=_language("llama"),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=ANY_RESOLUTION,
    )


def _llava_onevision() -> PretrainedConfig:
    return _config(
        "LlavaOnevisionConfig",
        vision_config=SIGLIP,
        text_config=_language("qwen2"),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=ANY_RESOLUTION,
    )


def _qwen2_vl() -> PretrainedConfig:
    tower = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return _config("Qwen2VLConfig", text_config=QWEN_LANGUAGE, vision_config=tower, **QWEN_TOKENS)


def _qwen2_5_vl() -> PretrainedConfig:
    return _config("Qwen2_5_VLConfig", text_config=QWEN_LANGUAGE, vision_config=QWEN_2_5_TOWER, **QWEN_TOKENS)


def _qwen3_vl() -> PretrainedConfig:
    language = {**QWEN_LANGUAGE, "head_dim": 8}
    return _config("Qwen3VLConfig", text_config=language, vision_config=QWEN_3_TOWER, **QWEN_TOKENS)


def _qwen2_5_omni() -> PretrainedConfig:
    return _config(
        "Qwen2_5OmniThinkerConfig",
        text_config=QWEN_LANGUAGE,
        vision_config=QWEN_2_5_TOWER,
        audio_config=OMNI_AUDIO,
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        audio_token_index=AUDIO_TOKEN,
        vision_start_token_id=VISION_START_TOKEN,
        audio_start_token_id=AUDIO_START_TOKEN,
    )


def _qwen3_omni_moe() -> PretrainedConfig:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return _config(
        "Qwen3OmniMoeThinkerConfig",
        text_config={**QWEN_LANGUAGE, "head_dim": 8, **experts},
        vision_config=QWEN_3_TOWER,
        # The model counts tokens in windows of 100 frames, whatever the configuration says.
        audio_config={**OMNI_AUDIO, "downsample_hidden_size": 8, "n_window": 50, "n_window_infer": 100},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        audio_token_id=AUDIO_TOKEN,
        vision_start_token_id=VISION_START_TOKEN,
        audio_start_token_id=AUDIO_START_TOKEN,
    )


def _internvl() -> PretrainedConfig:
    return _config(
        "InternVLConfig",
        vision_config={**SMALL_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=_language("qwen2"),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _gemma3() -> PretrainedConfig:
    language = _language(
        "gemma3_text",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return _config(
        "Gemma3Config",
        vision_config=SIGLIP,
        text_config=language,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=VISION_START_TOKEN,
        eoi_token_index=VISION_END_TOKEN,
    )


def _idefics3(class_name: str) -> PretrainedConfig:
    return _config(
        class_name,
        vision_config={**SMALL_TOWER, "image_size": 16, "patch_size": 4},
        text_config=_language("llama"),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )


def _paligemma() -> PretrainedConfig:
    return _config(
        "PaliGemmaConfig",
        vision_config={**SIGLIP, "projection_dim": HIDDEN},
        text_config=_language("gemma", head_dim=8),
        image_token_index=IMAGE_TOKEN,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )


def _mllama() -> PretrainedConfig:
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 2,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    language = {
        **LANGUAGE,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return _config("MllamaConfig", vision_config=tower, text_config=language, image_token_index=IMAGE_TOKEN)


def _video_llama_3() -> PretrainedConfig:
    return _config(
        "VideoLlama3Config",
        vision_config={**SMALL_TOWER, "patch_size": 4},
        text_config=_language("qwen2"),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
    )


def _video_llava() -> PretrainedConfig:
    return _config(
        "VideoLlavaConfig",
        vision_config=CLIP,
        text_config=_language("llama"),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_seq_length=16,
        video_seq_length=136,
    )


def _qwen2_audio() -> PretrainedConfig:
    tower = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    return _config(
        "Qwen2AudioConfig", audio_config=tower, text_config=_language("qwen2"), audio_token_index=AUDIO_TOKEN
    )


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
    "llava": Family("LlavaForConditionalGeneration", _llava, _pixels("pixel_values", 16)),
    "llava_next_llama": Family(_LLAVA_NEXT, lambda: _llava_next("llama"), _any_resolution),
    "llava_next_mistral": Family(_LLAVA_NEXT, lambda: _llava_next("mistral"), _any_resolution),
    "llava_next_mistral_window": Family(_LLAVA_NEXT, lambda: _llava_next("mistral", sliding_window=8), _any_resolution),
    "llava_next_video": Family("LlavaNextVideoForConditionalGeneration", _llava_next_video, _any_resolution),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", _llava_onevision, _any_resolution),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", _qwen2_vl, _grid),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, _grid),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", _qwen3_vl, _grid),
    "qwen2_5_omni": Family("Qwen2_5OmniThinkerForConditionalGeneration", _qwen2_5_omni, _grid),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerForConditionalGeneration", _qwen3_omni_moe, _grid),
    "internvl": Family("InternVLForConditionalGeneration", _internvl, _pixels("pixel_values", 4)),
    "gemma3": Family("Gemma3ForConditionalGeneration", _gemma3, _pixels("pixel_values", 4)),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration", lambda: _idefics3("Idefics3Config"), _pixels("pixel_values", 4, 1)
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration", lambda: _idefics3("SmolVLMConfig"), _pixels("pixel_values", 4, 1)
    ),
    "paligemma": Family("PaliGemmaForConditionalGeneration", _paligemma, _pixels("pixel_values", 16)),
    "mllama": Family("MllamaForConditionalGeneration", _mllama, _tiles),
    "video_llama_3": Family("VideoLlama3ForConditionalGeneration", _video_llama_3, _grid_of_single_frames),
    "video_llava": Family("VideoLlavaForConditionalGeneration", _video_llava, _pixels("pixel_values_images", 16)),
    "qwen2_audio": Family("Qwen2AudioForConditionalGeneration", _qwen2_audio, _sound),
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
    config = FAMILIES[family].config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, FAMILIES[family].model)(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            # Gates and norm gains that start at zero would hide what lies behind them.
            if parameter.numel() and not parameter.any():
                parameter.normal_(std=0.1)
    return model.to(dtype)


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
