"""Tiny checkpoint folders as they lie on the hub: weights, tokenizer, processor, and files that nobody asks for.

The tokenizer knows the printable ASCII characters and the special tokens of the family, under the ids that the tiny
models of `tests/families.py` use.
"""

import json
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import tiny_model
from tests.family_configs import (
    AUDIO_START_TOKEN,
    AUDIO_TOKEN,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END_TOKEN,
    VISION_START_TOKEN,
)

CLIP = ("CLIPImageProcessorPil", {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}})
ANY_RESOLUTION = {
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
}
SQUARE = {"size": {"height": 16, "width": 16}}
PATCHES = {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 512}
LLAVA = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOKENS = {
    "<|image_pad|>": IMAGE_TOKEN,
    "<|video_pad|>": VIDEO_TOKEN,
    "<|vision_start|>": VISION_START_TOKEN,
    "<|vision_end|>": VISION_END_TOKEN,
}
OMNI_NAMES = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
OMNI_IDS = (IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN, VISION_START_TOKEN, VISION_END_TOKEN, AUDIO_START_TOKEN, 106)
IDEFICS_TOKENS = {
    "<image>": IMAGE_TOKEN,
    "<fake_token_around_image>": 106,
    "<end_of_utterance>": 107,
    "<global-img>": 108,
}


@dataclass(frozen=True)
class Parts:
    """What makes the processor of a family.

    Attributes:
        processor: Name of its class.
        images: Class of the image processor, and its options.
        options: Options of the processor.
        tokens: Special token to its id.
        names: What the tokenizer calls some of them.
        image_text: What stands for an image in a rendered conversation.
        sounds: Options of the feature extractor, where the family takes sounds.
    """

    processor: str
    images: tuple[str, dict[str, Any]] | None
    options: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: {"<image>": IMAGE_TOKEN, "<video>": VIDEO_TOKEN})
    names: dict[str, str] = field(default_factory=dict)
    image_text: str = "<image>"
    sounds: dict[str, Any] | None = None


_QWEN = ("Qwen2VLImageProcessorPil", PATCHES | {"temporal_patch_size": 2})
_LLAVA_NEXT = Parts("LlavaNextProcessor", ("LlavaNextImageProcessorPil", ANY_RESOLUTION), LLAVA)
_OMNI = {
    "images": _QWEN,
    "tokens": dict(zip(OMNI_NAMES.values(), OMNI_IDS)),
    "names": OMNI_NAMES,
    "image_text": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "sounds": {"feature_size": 8},
}

PARTS: dict[str, Parts] = {
    "llava": Parts("LlavaProcessor", CLIP, LLAVA),
    "llava_next_llama": _LLAVA_NEXT,
    "llava_next_mistral": _LLAVA_NEXT,
    "llava_next_video": Parts("LlavaNextVideoProcessor", ("LlavaNextImageProcessorPil", ANY_RESOLUTION), LLAVA),
    "llava_onevision": Parts(
        "LlavaOnevisionProcessor",
        ("LlavaOnevisionImageProcessorPil", SQUARE | {"image_grid_pinpoints": ANY_RESOLUTION["image_grid_pinpoints"]}),
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"},
    ),
    "qwen2_vl": Parts("Qwen2VLProcessor", _QWEN, tokens=QWEN_TOKENS, image_text=QWEN_IMAGE),
    "qwen2_5_vl": Parts("Qwen2_5_VLProcessor", _QWEN, tokens=QWEN_TOKENS, image_text=QWEN_IMAGE),
    "qwen3_vl": Parts("Qwen3VLProcessor", _QWEN, tokens=QWEN_TOKENS, image_text=QWEN_IMAGE),
    "qwen2_5_omni": Parts("Qwen2_5OmniProcessor", **_OMNI),
    "qwen3_omni_moe": Parts("Qwen3OmniMoeProcessor", **_OMNI),
    "internvl": Parts(
        "InternVLProcessor",
        ("GotOcr2ImageProcessorPil", SQUARE | {"crop_to_patches": True, "min_patches": 1, "max_patches": 2}),
        {"image_seq_length": 4},
        {"<IMG_CONTEXT>": IMAGE_TOKEN, "<video>": VIDEO_TOKEN, "<img>": 106, "</img>": 107},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "<IMG_CONTEXT>",
    ),
    "gemma3": Parts(
        "Gemma3Processor",
        ("Gemma3ImageProcessorPil", SQUARE),
        {"image_seq_length": 4},
        {"<soft>": IMAGE_TOKEN, "<start_of_image>": VISION_START_TOKEN, "<end_of_image>": VISION_END_TOKEN},
        {"image_token": "<soft>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "<start_of_image>",
    ),
    "idefics3": Parts(
        "Idefics3Processor",
        ("Idefics3ImageProcessorPil", {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}),
        {"image_seq_len": 4},
        IDEFICS_TOKENS,
    ),
    "smolvlm": Parts(
        "SmolVLMProcessor",
        ("SmolVLMImageProcessorPil", {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}),
        {"image_seq_len": 4},
        IDEFICS_TOKENS,
    ),
    "paligemma": Parts("PaliGemmaProcessor", ("SiglipImageProcessorPil", SQUARE | {"image_seq_length": 16})),
    "mllama": Parts(
        "MllamaProcessor",
        ("MllamaImageProcessorPil", SQUARE | {"max_image_tiles": 2}),
        {},
        {"<|image|>": IMAGE_TOKEN, "<|python_tag|>": 106},
        {},
        "<|image|>",
    ),
    "video_llama_3": Parts(
        "VideoLlama3Processor",
        ("VideoLlama3ImageProcessorPil", PATCHES | {"merge_size": 2}),
        tokens=QWEN_TOKENS,
        image_text="<|image_pad|>",
    ),
    "video_llava": Parts("VideoLlavaProcessor", ("VideoLlavaImageProcessor", CLIP[1]), LLAVA),
    "qwen2_audio": Parts(
        "Qwen2AudioProcessor",
        None,
        tokens={"<|AUDIO|>": AUDIO_TOKEN, "<|audio_bos|>": AUDIO_START_TOKEN, "<|audio_eos|>": 106},
        sounds={"feature_size": 8, "chunk_length": 1, "hop_length": 500, "n_fft": 1000},
    ),
}


def make_tokenizer(parts: Parts) -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII, without merges: one token per character."""
    letters = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + number for number, letter in enumerate(letters)}}
    vocabulary |= {"<unk>": 99, **parts.tokens}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=parts.names,
    )
    fast.add_tokens(list(parts.tokens), special_tokens=True)
    return fast


def write_processor(folder: Path, family: str) -> None:
    """Write tokenizer, image processor, processor and chat template of a family, as its hub folders have them."""
    parts = PARTS[family]
    tokenizer = make_tokenizer(parts)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + parts.image_text
        + "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
        + "{% elif c['type'] == 'video' %}<video>{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
        + "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    written: dict[str, Any] = {}
    if parts.images is not None:
        class_name, options = parts.images
        getattr(transformers, class_name)(**options).save_pretrained(folder)
        written = json.loads((folder / "preprocessor_config.json").read_text())
    if parts.sounds is not None:
        features = transformers.WhisperFeatureExtractor(**parts.sounds)
        (folder / "preprocessor_config.json").write_text(json.dumps(features.to_dict() | written))
    entries = {"processor_class": parts.processor, **parts.options}
    (folder / "processor_config.json").write_text(json.dumps(entries))


def write_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write a sharded checkpoint folder in the layout of the hub, processor and all; the model that is in it."""
    model = tiny_model(family, dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    write_processor(folder, family)
    (folder / "README.md").write_text("A model card.")
    return model


def write_captions(folder: Path, count: int = 8) -> Path:
    """Generated images of several shapes, each with a caption, as LLaVA's JSON; the JSON file."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        width, height = [(32, 32), (40, 20), (20, 40), (64, 48)][number % 4]
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?" + " Please say." * (number % 3)},
            {"from": "gpt", "value": f"It is noise number {number}."},
        ]
        rows.append({"id": f"noise-{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder / "captions.json"


def write_sounds(folder: Path, count: int = 4) -> Path:
    """Generated sounds of several lengths, each with what is said about it, as LLaVA's JSON; the JSON file."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        samples = torch.randint(-(2**15), 2**15, (8000 + 2000 * number,), generator=generator, dtype=torch.int16)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(samples.numpy().tobytes())
        turns = [
            {"from": "human", "value": "<audio>\nWhat is it?"},
            {"from": "gpt", "value": f"It is noise number {number}."},
        ]
        rows.append({"id": f"noise-{number}", "audio": f"{number}.wav", "conversations": turns})
    (folder / "sounds.json").write_text(json.dumps(rows))
    return folder / "sounds.json"
