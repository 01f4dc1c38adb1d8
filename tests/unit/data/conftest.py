"""A tiny processor made offline, and a tiny set of pictures with questions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(*special_tokens: str, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: encodes any text, one token per byte, and needs no download."""
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)
    fast.add_tokens(list(special_tokens), special_tokens=True)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    """16 image tokens for a picture of 16 x 16 pixels."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer("<image>"),
        chat_template=TEMPLATE,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture
def llava_rows(tmp_path: Path) -> list[dict]:
    """Eight samples whose pictures lie in `tmp_path`: one each, but two in sample 2 and none in sample 3."""
    rows: list[dict] = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (20 + number, 16), colour).save(tmp_path / f"{colour}.png")
        question = f'<image>\nWhich "colour" {{is}} [this]?{" really" * number}'
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"It is {colour}, größer \\ \U0001f600."},
        ]
        rows.append({"id": f"id-{number}", "image": f"{colour}.png", "conversations": turns})
    rows[2]["image"] = ["red.png", "green.png"]
    rows[2]["conversations"][0]["value"] = "Left: <image> right: <image>\nSame?"
    del rows[3]["image"]
    rows[3]["conversations"][0]["value"] = "Which is the largest planet?"
    return rows


@pytest.fixture
def llava_json(tmp_path: Path, llava_rows: list[dict]) -> Path:
    path = tmp_path / "share.json"
    path.write_text(json.dumps(llava_rows, ensure_ascii=False), encoding="utf-8")
    return path
