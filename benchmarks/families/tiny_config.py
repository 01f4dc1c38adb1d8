"""Tiny configurations: a family's default configuration with every size made small, its structure kept.

defaults ──► sizes by name ──► fewer layers, every kind of layer kept ──► token ids below the small vocabulary
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

DECLARATIONS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "declarations.yaml").read_text())

WIDTH, HEADS, KEY_VALUE_HEADS, HEAD, FEED_FORWARD, EXPERT, VOCABULARY, BLOCKS = 32, 4, 2, 8, 48, 24, 160, 4
LARGEST_MODEL = 4_000_000
IMAGE_TOKEN = 100

# Small value -> what is set to it, wherever in a configuration it stands.
_NAMES: list[tuple[int, str]] = [
    (
        WIDTH,
        """hidden_size d_model word_embed_proj_dim dim embed_dim n_embd out_hidden_size output_dim projection_dim
        text_hidden_size encoder_hidden_size decoder_hidden_size projector_hidden_size vision_hidden_size
        moe_hidden_size projection_hidden_dim projection_hidden_size projector_input_dim projector_output_dim
        image_text_hidden_size image_token_embed_dim adapter_in_dim adapter_out_dim adapter_input_size
        patch_embed_hidden_size pooler_output_size vision_output_dim base_channels output_channels adapter_hidden_size
        dense_hidden""",
    ),
    (
        HEADS,
        """num_attention_heads attention_heads encoder_attention_heads decoder_attention_heads num_heads
        swa_num_attention_heads num_sliding_attention_heads resampler_n_heads resampler_heads linear_num_value_heads
        linear_num_heads index_n_heads qk_rope_head_dim rotary_dim""",
    ),
    (KEY_VALUE_HEADS, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads n_groups"),
    (
        HEAD,
        """head_dim swa_head_dim resampler_head_dim resampler_dim_head d_kv index_head_dim mamba_head_dim
        linear_head_dim linear_key_head_dim linear_value_head_dim mamba_num_heads ssm_state_size query_pre_attn_scalar
        qk_nope_head_dim v_head_dim hc_lowrank laurel_rank d_rel hidden_size_per_layer_input embed_dim_vq
        attention_chunk_size index_topk ple_embed_dim make_ngram_vocab_size_divisible_by num_mel_bins n_mel_bins
        downsample_hidden_size feature_size latent_channels pos_emb_height pos_emb_width posemb_grid_size""",
    ),
    (HEAD + 4, "qk_head_dim"),
    (
        FEED_FORWARD,
        """intermediate_size ffn_dim d_ff mlp_dim intermediate_size_mlp dense_intermediate_size encoder_ffn_dim
        decoder_ffn_dim shared_intermediate_size alignment_intermediate_size projection_intermediate_size patch_dim""",
    ),
    (
        EXPERT,
        """moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size share_expert_dim""",
    ),
    (4 * WIDTH, "merged_hidden_size"),
    (BLOCKS, "num_hidden_layers"),
    (
        2,
        """num_layers depth encoder_layers decoder_layers layers num_decoder_layers n_layers conf_num_hidden_layers
        aligner_num_add_layers mlp_ratio num_experts_per_tok moe_k moe_topk num_experts_per_token index_topk_blocks
        num_kv_shared_layers split_ngram_parts""",
    ),
    (1, "resampler_depth n_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace"),
    (
        4,
        """num_experts num_local_experts n_routed_experts moe_num_experts patch_size num_query_tokens latent_query_num
        resampler_n_latents resampler_num_latents mm_tokens_per_image index_block_size window_size""",
    ),
    (6, "sliding_window sliding_window_size"),
    (
        16,
        """kv_lora_rank q_lora_rank image_size num_image_tokens image_seq_length num_position_embeddings num_patches
        mel_vocab_size max_source_positions num_pos_feats img_max_token_num""",
    ),
    (
        64,
        """rel_extent position_embedding_size codebook_size num_embeddings max_2d_position_embeddings conv_output_size
        max_image_size max_vit_seq_len max_img_size max_num_patches seq_len""",
    ),
    (96, "video_patch_dim"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (200, "ngram_vocab_size_base"),
    (256, "max_position_embeddings n_positions"),
]
SIZES = {name: size for size, names in _NAMES for name in names.split()}

_TOWER_SIZES = {"num_hidden_layers": 3, "num_key_value_heads": HEADS}
_TOWER_WORDS = ("vision", "vq", "audio", "qformer", "perceiver", "protein", "encoder", "dit", "adapter")
_LISTS: dict[str, list] = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "intermediate_layers_indices": [1],
    "mtp_layers": [1],
    "cross_attention_layers": [1, 3],
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
}
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DROPPED = ("id2label", "label2id", "transformers_version", "_name_or_path", "num_labels", "model_type")

# The class that checkpoints name, where the mapping names a part of it.
_CLASSES = {"shieldgemma2": "ShieldGemma2ForImageClassification"}

Path_ = tuple[str, ...]


class _Shrinker:
    """Makes the values of one configuration small; equal token ids stay equal."""

    def __init__(self, declared: Mapping[str, Any]) -> None:
        self.declared = {tuple(path.split(".")): value for path, value in declared.items()}
        self.tokens: dict[int, int] = {}

    def config(self, values: Mapping[str, Any], path: Path_ = ()) -> dict[str, Any]:
        values = {name: value for name, value in values.items() if name not in _DROPPED or (path and "type" in name)}
        declared = {parts[-1]: value for parts, value in self.declared.items() if parts[:-1] == path}
        tower = any(word in part for part in path for word in _TOWER_WORDS)
        kept = self._kept_layers(values, declared, tower)
        shrunk = {
            name: self._value(name, value, values, path, tower, kept)
            for name, value in values.items()
            if name not in declared and name != "per_layer_config"
        }
        per_layer = values.get("per_layer_config")
        if isinstance(per_layer, dict) and per_layer and "per_layer_config" not in declared:
            place = {layer: index for index, layer in enumerate(kept)}
            shrunk["per_layer_config"] = {
                place[int(layer)]: _layer_values(entry, shrunk)
                for layer, entry in per_layer.items()
                if int(layer) in place
            }
        return shrunk | declared

    def _kept_layers(self, values: Mapping[str, Any], declared: Mapping[str, Any], tower: bool) -> list[int]:
        """Numbers of the layers that stay, so that every kind of layer does."""
        depth = values.get("num_hidden_layers")
        size = declared.get("num_hidden_layers", _TOWER_SIZES["num_hidden_layers"] if tower else BLOCKS)
        lists = {name: value for name, value in values.items() if _is_per_layer(value, depth, size)}
        if not lists:
            return list(range(size))
        kinds = {
            layer: {(name, json.dumps(value[layer])) for name, value in lists.items() if list(value) != [*range(depth)]}
            for layer in range(depth)
        }
        kept = [0, depth - 1]
        missing = set().union(*kinds.values()) - kinds[0] - kinds[depth - 1]
        while missing and len(kept) < 8:
            rest = [layer for layer in range(depth) if layer not in kept]
            best = max(rest, key=lambda layer: (len(kinds[layer] & missing), -layer))
            kept.append(best)
            missing -= kinds[best]
        for layer in range(1, depth):
            if len(kept) < size and layer not in kept:
                kept.append(layer)
        return sorted(kept)

    def _value(
        self, name: str, value: Any, values: Mapping[str, Any], path: Path_, tower: bool, kept: list[int]
    ) -> Any:
        if isinstance(value, dict) and value and ("config" in name or name in ("encoder", "decoder")):
            return self.config(value, (*path, name))
        if name == "rope_parameters" and isinstance(value, dict):
            return _rope(value)
        depth = values.get("num_hidden_layers")
        if _is_per_layer(value, depth, len(kept)):
            numbered = list(value) == [*range(depth)] and not isinstance(value[0], bool)
            return list(range(len(kept))) if numbered else [value[layer] for layer in kept]
        if isinstance(value, (bool, str)) or value is None:
            return value
        if "token_id" in name or "token_index" in name or name.endswith(("_id", "_ids")):
            many = isinstance(value, (list, tuple))
            return [self._token(name, item) for item in value] if many else self._token(name, value)
        if name == "num_hidden_layers":
            return len(kept)
        if name in _LISTS:
            return _LISTS[name]
        if name in SIZES:
            return _size(name, value, values, tower)
        return value

    def _token(self, name: str, token: Any) -> Any:
        if isinstance(token, bool) or not isinstance(token, int) or token < 90:
            return token
        if name.removeprefix("_") in _SPECIAL_TOKENS:
            return _SPECIAL_TOKENS[name.removeprefix("_")]
        return self.tokens.setdefault(token, IMAGE_TOKEN + len(self.tokens))


def _is_per_layer(value: Any, depth: Any, size: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and isinstance(depth, int)
        and len(value) == depth > size
        and not any(isinstance(item, (list, dict)) for item in value)
    )


def _size(name: str, value: Any, values: Mapping[str, Any], tower: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return [SIZES[name]] * len(value) if name in ("image_size", "patch_size") else value
    if value == 0:
        return value
    size = _TOWER_SIZES.get(name, SIZES[name]) if tower else SIZES[name]
    if name == "num_key_value_heads" and ("kv_lora_rank" in values or values.get("num_attention_heads") == value):
        size = HEADS
    if name == "head_dim" and "qk_rope_head_dim" in values:
        size = SIZES["qk_rope_head_dim"]
    return float(size) if isinstance(value, float) else size


def _layer_values(entry: Mapping[str, Any], shrunk: Mapping[str, Any]) -> dict[str, Any]:
    """What one layer has of its own: heads twice as wide, half as many."""
    values = {}
    for name, value in entry.items():
        base = shrunk.get(name, value)
        if name == "head_dim":
            base *= 2
        elif name == "num_local_experts":
            base = 2
        elif name in ("num_attention_heads", "num_key_value_heads"):
            base //= 2
        values[name] = base
    return values


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    shrunk: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            shrunk[name] = _rope(value)
        elif name == "mrope_section":
            shrunk[name] = [1, 1, 2]
        elif name == "xdrope_section":
            shrunk[name] = [1] * len(value)
        else:
            shrunk[name] = value
    return shrunk


def names() -> list[str]:
    """Every name of transformers' image-text-to-text mapping, then the variants that are declared."""
    return [*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *(name for name in DECLARATIONS if ":" in name)]


def tiny_config(name: str) -> PreTrainedConfig:
    """The small configuration of a family or a variant."""
    config_class = CONFIG_MAPPING[name.partition(":")[0]]
    return config_class(**_Shrinker(DECLARATIONS.get(name, {})).config(config_class().to_dict()))


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of the family, in eval mode and without gradients; the same weights at every call.

    Raises:
        MemoryError: It is not small.
    """
    config, family = tiny_config(name), name.partition(":")[0]
    class_name = _CLASSES.get(family) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        sizes = {path: weight.numel() for path, weight in model_class(copy.deepcopy(config)).named_parameters()}
    if sum(sizes.values()) > LARGEST_MODEL:
        raise MemoryError(f"{sum(sizes.values())} weights, {max(sizes, key=sizes.__getitem__)} has the most")
    torch.manual_seed(0)
    model = model_class(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # What starts at zero, or is not initialised at all, would hide what lies behind it.
        usable = parameter.isfinite().all() and parameter.abs().max() >= 1e-6 if parameter.numel() else True
        if parameter.is_floating_point() and not usable:
            parameter.normal_(std=0.1, generator=generator)
    mend_forward(model)
    return model


def mend_forward(model: PreTrainedModel) -> None:
    """Make a forward of transformers' own run that does not in the newest release; its results are as before."""
    if model.config.model_type == "llama4":
        model.language_model.register_forward_hook(_without_image_outputs)


def _without_image_outputs(module: nn.Module, arguments: tuple, output: Any) -> None:
    """Llama 4's own forward in transformers 5.24.0 ends by reading this from its text model, which has none."""
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None
