"""Small configurations of twenty families of large vision-language models."""

from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig

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


def config(class_name: str, **options: Any) -> PretrainedConfig:
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    return getattr(transformers, class_name)(**(options if VERSION_5 else as_in_version_4(options)))


def as_in_version_4(options: dict[str, Any]) -> dict[str, Any]:
    """The same options with rotary positions as transformers 4 spells them."""
    options = {name: as_in_version_4(value) if isinstance(value, dict) else value for name, value in options.items()}
    if rope := dict(options.pop("rope_parameters", {})):
        options |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    return options


def language(model_type: str, **options: Any) -> dict[str, Any]:
    return {**LANGUAGE, "model_type": model_type, **options}


def llava() -> PretrainedConfig:
    return config(
        "LlavaConfig",
        vision_config=CLIP,
        text_config=language("llama"),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )


def llava_next(model_type: str, **options: Any) -> PretrainedConfig:
    return config(
        "LlavaNextConfig",
        vision_config=CLIP,
        text_config=language(model_type, **options),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=ANY_RESOLUTION,
    )


def llava_next_video() -> PretrainedConfig:
    return config(
        "LlavaNextVideoConfig",
        vision_config=CLIP,
        text_config=language("llama"),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=ANY_RESOLUTION,
    )


def llava_onevision() -> PretrainedConfig:
    return config(
        "LlavaOnevisionConfig",
        vision_config=SIGLIP,
        text_config=language("qwen2"),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=ANY_RESOLUTION,
    )


def qwen2_vl() -> PretrainedConfig:
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
    return config("Qwen2VLConfig", text_config=QWEN_LANGUAGE, vision_config=tower, **QWEN_TOKENS)


def qwen2_5_vl() -> PretrainedConfig:
    return config("Qwen2_5_VLConfig", text_config=QWEN_LANGUAGE, vision_config=QWEN_2_5_TOWER, **QWEN_TOKENS)


def qwen3_vl() -> PretrainedConfig:
    language = {**QWEN_LANGUAGE, "head_dim": 8}
    return config("Qwen3VLConfig", text_config=language, vision_config=QWEN_3_TOWER, **QWEN_TOKENS)


def qwen2_5_omni() -> PretrainedConfig:
    return config(
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


def qwen3_omni_moe() -> PretrainedConfig:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return config(
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


def internvl() -> PretrainedConfig:
    return config(
        "InternVLConfig",
        vision_config={**SMALL_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=language("qwen2"),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def gemma3() -> PretrainedConfig:
    text = language(
        "gemma3_text",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return config(
        "Gemma3Config",
        vision_config=SIGLIP,
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=VISION_START_TOKEN,
        eoi_token_index=VISION_END_TOKEN,
    )


def idefics3(class_name: str) -> PretrainedConfig:
    return config(
        class_name,
        vision_config={**SMALL_TOWER, "image_size": 16, "patch_size": 4},
        text_config=language("llama"),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )


def paligemma() -> PretrainedConfig:
    return config(
        "PaliGemmaConfig",
        vision_config={**SIGLIP, "projection_dim": HIDDEN},
        text_config=language("gemma", head_dim=8),
        image_token_index=IMAGE_TOKEN,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )


def mllama() -> PretrainedConfig:
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
    return config("MllamaConfig", vision_config=tower, text_config=language, image_token_index=IMAGE_TOKEN)


def video_llama_3() -> PretrainedConfig:
    return config(
        "VideoLlama3Config",
        vision_config={**SMALL_TOWER, "patch_size": 4},
        text_config=language("qwen2"),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
    )


def video_llava() -> PretrainedConfig:
    return config(
        "VideoLlavaConfig",
        vision_config=CLIP,
        text_config=language("llama"),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_seq_length=16,
        video_seq_length=136,
    )


def qwen2_audio() -> PretrainedConfig:
    tower = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    return config("Qwen2AudioConfig", audio_config=tower, text_config=language("qwen2"), audio_token_index=AUDIO_TOKEN)
