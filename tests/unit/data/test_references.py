"""Whatever a record calls its images, they are read or the record is refused; none is left out in silence."""

import base64
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lvlm_prune.data import LlavaJsonSource
from lvlm_prune.data.conversation import load_image
from lvlm_prune.errors import RunError

ASKED = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
PAIRS = [{"user": "What is it?", "assistant": "A cat.", "source": "ai2d"}]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    # Noise cannot be compressed: as base64 it is longer than any file name.
    pixels = torch.randint(0, 256, (10, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def read(folder: Path, record: dict):
    (folder / "data.json").write_text(json.dumps([record]))
    return LlavaJsonSource(str(folder / "data.json"))[0]


def encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def part(**entries: object) -> list[dict]:
    return [{"role": "user", "content": [entries, {"type": "text", "text": "What is it?"}]}, ASKED[1]]


WAYS = {
    "image": lambda name, data: {"image": name, "conversations": ASKED},
    "images": lambda name, data: {"images": [name], "conversations": ASKED},
    "both, the same": lambda name, data: {"image": name, "images": [name], "conversations": ASKED},
    "messages": lambda name, data: {"image": name, "messages": ASKED},
    "part with a path": lambda name, data: {"messages": part(type="image", image=name)},
    "part with an address": lambda name, data: {"messages": part(type="image_url", image_url={"url": data})},
    "part with an address as text": lambda name, data: {"messages": part(type="input_image", image_url=data)},
    "part with a file of its own": lambda name, data: {"conversations": part(type="image", path=name)},
    "data URI": lambda name, data: {"image": data, "conversations": ASKED},
    "an object with its path": lambda name, data: {"images": [{"path": name}], "conversations": ASKED},
    "an object with its bytes": lambda name, data: {
        "image": {"bytes": data.partition(",")[2], "path": "elsewhere.png"},
        "conversations": ASKED,
    },
    "by its place": lambda name, data: {"image": {"<image_00>": name}, "conversations": ASKED},
    "pairs": lambda name, data: {"images": [name], "texts": PAIRS},
    "pairs of a conversation": lambda name, data: {"images": [{"bytes": None, "path": name}], "conversations": PAIRS},
    "base64": lambda name, data: {"image": [data.partition(",")[2]], "conversations": ASKED},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_an_image_is_read_wherever_the_record_names_it(way, picture: Path):
    sample = read(picture.parent, way("a.png", f"data:image/png;base64,{encoded(picture)}"))
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    (image,) = sample.images
    assert load_image(image).tobytes() == load_image(picture).tobytes()


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_images_by_their_places_stand_where_the_text_says(first: int, in_parts: bool, tmp_path: Path):
    """Also where the text names only the second of them: the first comes before all."""
    files = {f"<image_{first + number:02}>": f"{name}.png" for number, name in enumerate("ab")}
    text = f"Look at <image_{first + 1:02}>."
    asked = [{"role": "user", "content": [{"type": "text", "text": text}] if in_parts else text}, ASKED[1]]
    sample = read(tmp_path, {"image": files, "conversations": asked})
    assert sample.images == [tmp_path / "a.png", tmp_path / "b.png"]
    assert [part.get("text") for part in sample.messages[0]["content"]] == [None, "Look at ", None, "."]


def test_keys_without_anything_are_none(tmp_path: Path):
    """Columnar files fill what a turn does not have."""
    turns = [{"role": None, "content": None, **ASKED[0]}, {**ASKED[1], "role": "assistant", "content": ""}]
    sample = read(tmp_path, {"conversations": turns})
    said = [(message["role"], message["content"][0]["text"]) for message in sample.messages]
    assert said == [("user", "What is it?"), ("assistant", "A cat.")]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_what_is_said_to_the_system_beside_the_turns_comes_first(key: str, tmp_path: Path):
    system = {"role": "system", "content": [{"type": "text", "text": "Answer in <image> or two words."}]}
    for turns in ({"conversations": ASKED}, {"texts": PAIRS}, {"messages": [system, *ASKED]}):
        messages = read(tmp_path, {key: "Answer in <image> or two words.", **turns}).messages
        assert messages[0] == system
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        for nothing in ("", None, {"os": "a b"}, 3, "android" if key == "system" else ""):
            assert read(tmp_path, {key: nothing, **turns}).messages[-2:] == messages[-2:]


@pytest.mark.parametrize("said", ["你是一个有用的助手", "Be\nbrief.", "You are helpful"])
def test_a_system_is_told_from_the_name_of_one(said: str, tmp_path: Path):
    assert read(tmp_path, {"system": said, "conversations": ASKED}).messages[0]["content"][0]["text"] == said
    assert read(tmp_path, {"system_prompt": "Short.", "conversations": ASKED}).messages[0]["role"] == "system"
    for name in ("Windows 11", "Ubuntu 22.04 LTS", "鸿蒙"):
        assert read(tmp_path, {"system": name, "conversations": ASKED}).messages[0]["role"] == "user"


def test_one_word_beside_a_text_describes_the_turn(tmp_path: Path):
    described = [{**ASKED[0], "developer": "acme", "observation": "none"}, {**ASKED[1], "function": "caption"}]
    assert len(read(tmp_path, {"conversations": described}).messages) == 2


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_lists_of_videos_and_sounds_are_read(kind: str, tmp_path: Path):
    sample = read(tmp_path, {f"{kind}s": ["a.bin", "b.bin"], "conversations": ASKED})
    assert getattr(sample, f"{kind}s") == [tmp_path / "a.bin", tmp_path / "b.bin"]


def said(text: str) -> list[dict]:
    return [{"from": "human", "value": text}, ASKED[1]]


def as_text(**entries: object) -> list[dict]:
    return part(type="text", text="Look.", **entries)


ANTHROPIC = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo" + "A" * 40}
REFUSED = {
    "another one": ({"image": "a.png", "image_2": "b.png", "conversations": ASKED}, "`image_2` is not understood"),
    "one without suffix": ({"image": "1/a", "image_2": "1/b", "conversations": ASKED}, "`image_2` is not understood"),
    "its address": ({"image": "a", "image_url_2": "http://x.org/b", "conversations": ASKED}, "`image_url_2` is not"),
    "an ordinal": ({"image": "a.png", "second_image": "b.png", "conversations": ASKED}, "`second_image` is not"),
    "a synonym beside": ({"image": "a.png", "img": "b.png", "conversations": ASKED}, "`img` is not understood"),
    "in an object": ({"image": "a.png", "shot": {"path": "b.png"}, "conversations": ASKED}, "`shot.path` is not"),
    "by its value alone": ({"image": "a.png", "mask": "b.png", "conversations": ASKED}, "`mask` is not understood"),
    "by its content": ({"image": "a.png", "more": "data:image/png;base64,A", "conversations": ASKED}, "`more` is not"),
    "deep inside": ({"metadata": {"image": "b.png"}, "conversations": ASKED}, "`metadata.image` is not understood"),
    "deep, another": ({"image": "a.png", "meta": {"image": "b.png"}, "conversations": ASKED}, "`meta.image` is not"),
    "one of two": ({"image_before": "a.png", "conversations": ASKED}, "`image_before` is not understood"),
    "attached": ({"attachments": ["a.png"], "conversations": ASKED}, "`attachments` is not understood"),
    "the only name": ({"file_name": "b.png", "conversations": ASKED}, "`file_name` is not understood"),
    "of another kind": ({"image": "a.png", "source_video": "a.mp4", "conversations": ASKED}, "`source_video` is not"),
    "in a list": ({"extra": [{"file": "b.wav"}], "conversations": ASKED}, "`extra.file` is not understood; `audio`"),
    "in a turn": ({"conversations": [ASKED[0] | {"image": "a.png"}, ASKED[1]]}, "turn 0: `image` is not understood"),
    "in a part of text": ({"messages": as_text(image_url={"url": "a.png"})}, "turn 0: `image_url.url` is not"),
    "in a part of an image": ({"image": "a.png", "messages": part(type="image", source=ANTHROPIC)}, "`source.data` is"),
    "two in a part": ({"messages": part(type="image", image="a.png", extra="b.png")}, "turn 0: `extra` is not"),
    "turns twice": ({"conversations": ASKED, "messages": said("And that?")}, "hold different turns"),
    "a video's place": (
        {"conversations": said("<video>\nWhat?")},
        "has the placeholder <video>, and the record",
    ),
    "a sound's place": ({"conversations": said("What do you hear? <audio>")}, "has the placeholder <audio>"),
    "in the text": ({"conversations": said("Picture 1: <img>a.png</img> What?")}, "names a file in its text"),
    "a sound in the text": ({"conversations": said("<audio>b/a.wav</audio>")}, "names a file in its text"),
    "an internal place": ({"conversations": said("<IMG_CONTEXT> What?")}, "has the placeholder <IMG_CONTEXT>"),
    "speech": ({"conversations": said("<speech>\nWhat?")}, "names no audio for it"),
    "short for it, deep inside": ({"input": {"img": "a"}, "conversations": ASKED}, "`input.img` is not understood"),
    "a numbered place": ({"conversations": said("<image_1> What?")}, "has the placeholder <image_1>"),
    "a token's place": ({"conversations": said("<|image|>What?")}, "has the placeholder <|image|>".replace("|", "[|]")),
    "another key": ({"image_path": "a.png", "conversations": ASKED}, "`image_path` is not understood"),
    "several keys": ({"image_0": "a.png", "image_1": "b.png", "conversations": ASKED}, "`image_0` is not understood"),
    "encoded": ({"image_base64": "iVBORw0KGgo", "conversations": ASKED}, "`image_base64` is not understood"),
    "one of a kind": ({"main_image": "a.png", "conversations": ASKED}, "`main_image` is not understood"),
    "frames": ({"frames": ["a.png"], "conversations": ASKED}, "`frames` is not understood; `video` or `videos`"),
    "words for a name": ({"image_file_name": "a.png", "conversations": ASKED}, "`image_file_name` is not understood"),
    "a WebDataset": ({"jpg": "a.jpg", "conversations": ASKED}, "`jpg` is not understood"),
    "in one word": ({"videoFramePaths": ["a.png"], "conversations": ASKED}, "`videoFramePaths` is not understood"),
    "which frames": ({"key-frames": ["a.png"], "conversations": ASKED}, "`key-frames` is not understood"),
    "a task that is no name": ({"task": {"name": "vqa"}, "conversations": ASKED}, "`task` is dict, not a name"),
    "short for it": ({"imgs": ["a.png"], "conversations": ASKED}, "`imgs` is not understood"),
    "objects": ({"images": [{"bytes": "x"}], "conversations": ASKED}, "x is no base64"),
    "objects of nothing": ({"images": [{"width": 3}], "conversations": ASKED}, "neither a file name nor a list"),
    "two in an object": (
        {"images": [{"path": "a.png", "mask": "b.png"}], "conversations": ASKED},
        "`mask` is not understood",
    ),
    "a number left out": (
        {"image": {"<image_00>": "a.png", "<image_02>": "b.png"}, "conversations": ASKED},
        "leaves out a number: <image_00>, <image_02>",
    ),
    "a tool in a pair": ({"texts": [{**PAIRS[0], "tool": "3 cats"}]}, "turn 0 has `tool`, which is not understood"),
    "a call of a tool": ({"messages": [ASKED[0], {**ASKED[1], "tool_calls": [{}]}]}, "turn 1 has `tool_calls`, which"),
    "two systems": (
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, *ASKED]},
        "`system` and a turn of the system say different things",
    ),
    "which one": ({"image_ref": "coco_0017", "conversations": ASKED}, "`image_ref` is not understood"),
    "which of a kind": ({"video_reference": "clips/17", "conversations": ASKED}, "not understood; `video` or `videos`"),
    "which figure": ({"meta": {"figure": "paper/fig_2"}, "conversations": ASKED}, "`meta.figure` is not understood"),
    "two speakers": ({"conversations": [{**ASKED[0], "role": "assistant"}]}, "turn 0 is the assistant's by `role`"),
    "nothing said": ({"conversations": [ASKED[0] | {"value": " "}, ASKED[1] | {"value": ""}]}, "nothing is said"),
    "two texts": ({"conversations": [{**ASKED[0], "content": "Who?"}]}, "turn 0 holds different things"),
    "in a pair": ({"texts": [{**PAIRS[0], "image": "a.png"}]}, "turn 0: `image` is not understood"),
    "two that differ": ({"image": "a.png", "images": ["b.png"], "conversations": ASKED}, "name different images"),
    "an address": ({"image": "https://example.org/a.png", "conversations": ASKED}, "is an address; download"),
    "no base64": ({"image": "data:image/png;base64,?!", "conversations": ASKED}, "is no base64"),
    "no image": ({"image": "data:image/png;base64,AAAA", "conversations": ASKED}, "cannot be read as an image"),
    "a video as data": ({"video": "data:video/mp4;base64,AAAA", "conversations": ASKED}, "a video as data"),
    "beside and within": ({"image": "a.png", "messages": part(type="image", image="a.png")}, "beside the turns and in"),
    "a part of another kind": ({"messages": part(type="tool_use", id="1")}, "has a part of type 'tool_use'"),
    "a role that is no word": ({"messages": [{"role": ["user"], "content": "a"}]}, "has the role"),
}


@pytest.mark.parametrize(("record", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_refused(record: dict, problem: str, tmp_path: Path):
    with pytest.raises(RunError, match=problem):
        read(tmp_path, record)


def test_what_only_describes_an_image_is_no_obstacle(picture: Path):
    described = {"image": "a.png", "image_url": "https://example.org/a.png", "image_id": 7, "image_size": [20, 10]}
    assert read(picture.parent, {**described, "conversations": ASKED}).images == [picture]


HARMLESS = {
    "its name": {"file_name": "0001.png", "original_path": "coco/7.jpg", "imageUrl": "x/y.png"},
    "its addresses": {
        "coco_url": "http://x.org/7.jpg",
        "image_link": "https://x.org/7",
        "seen_at": "https://x.org/7.jpg",
    },
    "the same": {"metadata": {"image": "data/a.png"}, "img": "a.png", "extra": ["a.png"], "picture": {"path": "a.png"}},
    "what is shown": {"image_name": "A cat", "picture": "A cat", "title": "cat.jpg", "image_format": "PNG"},
    "its question": {"question_id": "VizWiz_train_00000000.jpg", "sample_id": "7.jpg"},
    "its size": {"image_size": "20x10", "image_width": 20, "metadata": {"image": {"width": 20}, "media": "newspaper"}},
    "where it is from": {"image_ref": "coco_0017", "figure": "paper/fig_2"},
    "nothing": {"image_2": None, "images": [], "video": "", "image_3": "None", "second_image": []},
}


@pytest.mark.parametrize("described", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_describes_an_image_that_is_read_is_no_obstacle(described: dict, picture: Path):
    assert read(picture.parent, {"image": "a.png", **described, "conversations": ASKED}).images == [picture]


TEXTS = [
    "Which image is a.png?",
    "What does the <video> tag do in HTML?",
    "Is `<audio>` an element?",
    "<video>a</video>",
    "List images: a.png b.png",
    "It shows [image] and [video] in brackets.",
    "a > b and image < video",
    "What is <video>?",
    "What's the difference between <img> and <picture>?",
    "How do I close <img> in JSX?",
    "Explain <video> vs <embed>",
    "Why does LiveData<Video> not update?",
    "prog <video> [<audio>] [-o FILE]",
    "What does <|image_pad|> do in Qwen?",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_may_speak_of_images(text: str, tmp_path: Path):
    answer = "a.png\n<video>\nis replaced, and <img>a</img> too"
    record = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}
    record |= {"answers": ["logo.png"], "ocr_tokens": ["a", "image.png"], "title": "foo.gif", "tags": ["image.png"]}
    record |= {"avatar": "https://x.org/av.png", "clip": "ViT-L/14", "speech": "hello world", "orig": "/data/zzz.tif"}
    record |= {"url": "https://commons.wikimedia.org/wiki/File:Foo.jpg", "instruction": "photo.jpg"}
    record |= {"figure": "2a", "fig": "17", "figures": ["3", "Figure 4"], "image_ref": "COCO", "video_ref": "17"}
    record |= {"photo_reference": "n/a", "imageref": "none/unknown", "meta": {"figure": "Fig.3", "fig": "table2"}}
    record |= {"source": "set.json", "metadata": {"note": "shown in a.png on page 3 of the book", "media": "print"}}
    assert read(tmp_path, record).images == []


def test_turns_under_both_names_that_are_the_same_are_read(tmp_path: Path):
    assert len(read(tmp_path, {"conversations": ASKED, "messages": ASKED}).messages) == 2


def test_what_only_counts_images_is_no_obstacle(tmp_path: Path):
    counted = {"has_image": False, "num_images": 2, "image_id": "a7", "imagination": "free", "social_media": "yes"}
    counted |= {"part_of_speech": "noun", "image_caption": "A cat.", "image_source": "COCO", "question_about": "images"}
    assert read(tmp_path, {**counted, "conversations": ASKED}).images == []


def test_a_long_name_is_shortened_in_messages(tmp_path: Path):
    sample = read(tmp_path, {"image": "x" * 200 + "/" + "y" * 200, "conversations": ASKED})
    with pytest.raises(RunError) as caught:
        load_image(sample.images[0])
    assert len(str(caught.value)) < 350


BESIDE = {
    "another image": {"source": "b.png"},
    "in words that speak of much else": {"context": ["see", "b.png"]},
    "deep inside": {"metadata": {"name": "b.png"}},
    "a document": {"document": "b.pdf"},
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
def test_files_that_are_there_and_nobody_reads_are_told_of_once(beside: dict, picture: Path, caplog):
    (key,) = beside
    for name in ("b.png", "b.pdf"):
        (picture.parent / name).write_bytes(b"")
    absent = json.loads(json.dumps(beside).replace("b.p", "c.p"))
    same = json.loads(json.dumps(beside).replace("b.png", "x/a.png").replace("b.pdf", "a.png"))
    record = {"image": "a.png", "conversations": ASKED}
    (picture.parent / "data.json").write_text(json.dumps([record | one for one in (absent, same, beside, beside)]))
    source = LlavaJsonSource(str(picture.parent / "data.json"))
    assert [source[number].images for number in range(4)] == [[picture]] * 4
    (said,) = [one.getMessage() for one in caplog.records]
    assert said.startswith(f"`{key}")
    assert "b.p" in said
