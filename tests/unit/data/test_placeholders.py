"""What a text shows is read or refused; what it only speaks of stays as it is written."""

import json
import time
from pathlib import Path

import datasets
import pytest
from PIL import Image

from lvlm_prune.data import HFDatasetSource, LlavaJsonSource, encode
from lvlm_prune.data.conversation import place_media
from lvlm_prune.data.labels import encode_with_labels
from lvlm_prune.data.overlooked import refuse_unfilled
from lvlm_prune.data.placeholders import placeholders_in
from lvlm_prune.data.processing import render
from lvlm_prune.errors import RunError

ANSWER = {"from": "gpt", "value": "Yes."}
# As Pixtral, LLaVA, Qwen, Gemma, GLM, Janus, InternVL, InternLM-XComposer and others have them.
TOKENS = ["[IMG]", "<im_patch>", "<|image_pad|>", "<start_of_image>", "<|begin_of_image|>", "<image_placeholder>"]
TOKENS += ["<IMG_CONTEXT>", "<ImageHere>", "<image_soft_token>", "<|vision_start|><|image_pad|><|vision_end|>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    return tmp_path


def read(folder: Path, asked: object, **record: object):
    turns = [{"role": "user", "content": asked}, ANSWER]
    (folder / "data.json").write_text(json.dumps([{"conversations": turns, **record}]))
    return LlavaJsonSource(str(folder / "data.json"))[0]


def said(sample) -> list[str]:
    return [part.get("text", part["type"]) for part in sample.messages[0]["content"]]


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_of_one_family_stand_for_no_image_of_a_record(token, folder: Path):
    with pytest.raises(RunError, match="which is not understood; <image> marks the place"):
        read(folder, f"{token}\nWhat is it?", image="a.png")
    with pytest.raises(RunError, match="and the record names no image for it"):
        read(folder, f"{token}\nWhat is it?")
    asked = f"What does {token} do in this picture?"
    assert said(read(folder, asked, image="a.png")) == ["image", asked]


@pytest.mark.parametrize("form", ["<image {}>", "<image_{}>", "<image_0{}>", "<|image_{}|>", "<img{}>"])
def test_numbered_placeholders_stand_for_the_image_of_that_number(form, folder: Path):
    one, two, three = map(form.format, (1, 2, 3))
    sample = read(folder, f"Is {two}\nlike {one}, not {two}?", images=["a.png", "b.png"])
    assert said(sample) == ["Is ", "image", "like ", "image", f", not {two}?"]
    assert [image.name for image in sample.images] == ["b.png", "a.png"]
    sample = read(folder, f"Is {two} one?", images=["a.png", "b.png"])
    assert said(sample) == ["image", "Is ", "image", " one?"]
    assert [image.name for image in sample.images] == ["a.png", "b.png"]
    with pytest.raises(RunError, match="a placeholder stands for image 2, and the record names 1"):
        read(folder, f"{one} {two}", image="a.png")
    with pytest.raises(RunError, match="has the placeholder"):
        read(folder, f"<image>\n{three}", image="a.png")


def test_numbers_may_begin_at_zero(folder: Path):
    sample = read(folder, "<image_1> <image_0>", images=["a.png", "b.png"])
    assert [image.name for image in sample.images] == ["b.png", "a.png"]


SHOWN = {
    "an element": '<img width=3 src="a.png">What is it?',
    "an element without quotes": "See: <img src=a.png>",
    "Markdown": "![a cat](a.png 'A cat')",
    "a line": "What is it?\na.png\n",
    "a part": ["a.png", {"type": "text", "text": "What is it?"}],
    "two in a part": [{"type": "image", "image": "b.png", "path": "a.png"}],
    "two in an object": [{"type": "image_url", "image_url": {"url": "b.png", "path": "a.png"}}],
}


@pytest.mark.parametrize("asked", SHOWN.values(), ids=SHOWN.keys())
def test_files_that_a_text_names_are_not_left_out_in_silence(asked, folder: Path):
    with pytest.raises(RunError, match=r"turn 0\b.* (a.png|another image)"):
        read(folder, asked)


@pytest.mark.parametrize("asked", ['Mend <img src="c.png">', "![logo](c.png)\nRewrite this.", ["c.png is", "what?"]])
def test_names_of_no_file_are_text(asked, folder: Path):
    assert read(folder, asked).images == []
    shown = asked.replace("c.png", "a.png") if isinstance(asked, str) else "What?"
    assert [image.name for image in read(folder, shown, image="x/a.png").images] == ["a.png"]  # it is read


@pytest.mark.parametrize("column", ["pixel_values", "input_features"])
def test_what_a_processor_made_of_media_is_not_left_out_in_silence(column, folder: Path):
    with pytest.raises(RunError, match=rf"`{column}` is what a processor makes of media"):
        read(folder, "What is it?", **{column: [[0.5]]})
    for value in ([0.5], [[0.5]]):
        datasets.Dataset.from_list([{"question": "What?", "answer": "A.", column: value}]).to_parquet(
            folder / "a.parquet"
        )
        with pytest.raises(ValueError, match=f"the column {column} holds (image|audio)s and has no role"):
            HFDatasetSource(str(folder / "a.parquet")).setup()


SPOKEN = ["How do I docker run <image> here?", "docker run <image>", "Usage: pull <image> <image> [-q]"]


@pytest.mark.parametrize("asked", SPOKEN)
def test_a_placeholder_in_a_sentence_is_text_and_is_no_image(asked, folder: Path, processor):
    """Neither a reason to refuse it, nor a token that stands for an image."""
    sample = read(folder, asked)
    sample.messages[1]["content"][0]["text"] = "docker run <image>"
    assert (sample.images, said(sample)) == ([], [asked])
    inputs = encode_with_labels(processor, sample)
    ids = inputs["input_ids"]
    assert not (ids == processor.image_token_id).any()
    spoken = asked.replace("<image>", "< image>")
    assert processor.tokenizer.decode(ids[0]) == f"user: {spoken}</s>assistant: docker run < image></s>"
    learnt = inputs["labels"][0] != -100
    assert processor.tokenizer.decode(ids[0, learnt]) == "docker run < image></s>"


def test_content_of_another_source_may_be_plain_text_with_placeholders(processor):
    """Templates take it where they are written for it."""
    processor.chat_template, before = "{% for m in messages %}{{ m['content'] }}{% endfor %}", processor.chat_template
    try:
        assert render(processor, [{"role": "user", "content": "<image> What?"}]) == "<image> What?"
    finally:
        processor.chat_template = before


def test_the_place_of_an_image_is_that_of_a_video_where_there_is_no_image(folder: Path):
    """So LLaVA-Video's data are written."""
    assert said(read(folder, "<image>\nWhat is it?", video="a.mp4")) == ["video", "What is it?"]
    assert said(read(folder, "<video>\nDoes <image> work?", video="a.mp4")) == ["video", "Does <image> work?"]
    both = read(folder, "<image><video>What is it?", video="a.mp4", image="a.png")
    assert said(both) == ["image", "video", "What is it?"]
    with pytest.raises(RunError, match=r"more video placeholders \(2\) than videos \(1\)"):
        read(folder, "<image>\n<image>\nWhat is it?", video="a.mp4")


def test_an_image_is_still_an_image(folder: Path, processor):
    ids = encode(processor, read(folder, "docker run <image>", image="a.png"))["input_ids"]
    assert (ids == processor.image_token_id).sum() == 16


LONG = ["[IMG] x ", "x <image> y ", "<image>" + 9 * " ", "![", "![a](", "<img ", "<img>a", " ", "<image_", "a \t"]


@pytest.mark.parametrize("piece", LONG)
def test_no_text_takes_long(piece: str):
    """Of half a million characters, with nothing behind them that ends what they begin."""
    text = "Q" + piece * (500_000 // len(piece)) + "<image> " + " " * 100_000 + "x"
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    started = time.monotonic()
    refuse_unfilled(messages, Path("nowhere"))
    place_media(messages, ["a", "b"])
    assert time.monotonic() - started < 30


def test_turns_of_chat_formats_are_no_placeholders():
    assert not [*placeholders_in("<|im_start|>user<|im_end|> [img]a[/img] [IMG]http://a.b/c[/IMG] List<Images>")]
