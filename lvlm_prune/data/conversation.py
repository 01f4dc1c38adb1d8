"""What a calibration sample is before the model's processor has seen it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os.path import exists, isfile
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from lvlm_prune.data.placeholders import placeholders_in
from lvlm_prune.data.turns import ROLES, speaker_of, text_of
from lvlm_prune.errors import RunError, first_line, shortened, why_no_file

File = TypeVar("File")
Message = dict[str, Any]
"""One turn in Hugging Face's chat format: `{"role": ..., "content": [{"type": "text", "text": ...}, ...]}`."""

MEDIA = ("image", "video", "audio")
"""What a part of a turn may be besides text; in strings `<image>`, `<video>` and `<audio>` mark their places."""

_LONGEST_NAME = 200  # in messages; an image may be its own name


@dataclass
class Conversation:
    """Chat messages and the images, videos and sounds that their placeholders stand for.

    Args:
        messages: Turns in Hugging Face's chat format; every image is a part `{"type": "image"}` of its turn's content,
            videos and sounds likewise are parts of type `video` and `audio`.
        images: One per image part, in order: an opened image, or a path that is opened when the sample is encoded.
        id: Name of the sample in messages to the user.
        videos: One file per video part, in order.
        audios: One file per audio part, in order.
        task: What the sample is scored under in an evaluation; empty where it does not say.
    """

    messages: list[Message]
    images: list[Image.Image | Path] = field(default_factory=list)
    id: str = ""
    videos: list[Path] = field(default_factory=list)
    audios: list[Path] = field(default_factory=list)
    task: str = ""

    def beginning(self, turns: int) -> Conversation:
        """The first turns, with what belongs to them."""
        messages = self.messages[:turns]
        kinds = [part["type"] for message in messages for part in message["content"]]
        images, videos, audios = (kinds.count(kind) for kind in MEDIA)
        return Conversation(messages, self.images[:images], self.id, self.videos[:videos], self.audios[:audios])


@dataclass
class Document:
    """Plain text of a corpus. It goes through the tokenizer, not through the chat template.

    Args:
        text: The text; placeholders of a processor (`<image>`) that happen to occur in it are ordinary characters.
        max_tokens: The text is cut off after that many tokens.
        id: Name of the sample in messages to the user.
    """

    text: str
    max_tokens: int | None = None
    id: str = ""


def task_name(value: Any) -> str:
    """What a record says its task is, which is a word or a number; empty where it says nothing.

    Raises:
        ValueError: It is neither.
    """
    if value is None or isinstance(value, (str, int, float)):
        return str(value or "")
    raise ValueError(f"`task` is {type(value).__name__}, not a name")


def load_image(image: Image.Image | Path) -> Image.Image:
    """The image, upright and in RGB, as transformers' own loader would give it; 16 bits per pixel become 8.

    Raises:
        RunError: The file is missing or is not an image, or its pixels are no brightness that is known.
    """
    with _read_as_image(image):
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        return _in_eight_bits(ImageOps.exif_transpose(opened)).convert("RGB")


def refuse_no_image(file: Path) -> None:
    """Look at the head of a file, without decoding it.

    Raises:
        RunError: It is missing or is not an image.
    """
    with _read_as_image(file), Image.open(file):
        pass


@contextmanager
def _read_as_image(image: Image.Image | Path) -> Iterator[None]:
    """Within, what goes wrong with an image becomes a line that names its file."""
    name = (getattr(image, "filename", "") or "image") if isinstance(image, Image.Image) else str(image)
    if isinstance(image, Path) and exists(image) and not isfile(image):
        raise RunError(f"{shortened(name, _LONGEST_NAME)}: {why_no_file(image)}")
    try:
        yield
    except FileNotFoundError:
        raise RunError(f"{shortened(name, _LONGEST_NAME)}: no such image file") from None
    except MemoryError:
        raise
    # Pillow's decoders raise errors of every kind: SyntaxError for PNGs, struct.error, DecompressionBombError, ...
    except Exception as error:
        reason = "not an image" if "cannot identify" in str(error) else first_line(error)
        raise RunError(f"{shortened(name, _LONGEST_NAME)}: cannot be read as an image ({reason})") from None


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The image with brightness from 0 to 255, which Pillow takes for granted: brighter pixels become white.

    Raises:
        RunError: Its pixels are fractions, or wider than 16 bits.
    """
    if image.mode[0] not in "IF":
        return image
    low, high = image.convert(image.mode[0]).getextrema()
    if image.mode == "F" or low < 0 or high >= 2**16:  # type: ignore[operator]  # one channel: a pair of numbers
        raise RunError(f"its pixels lie between {low} and {high}; save it with 8 bits per channel")
    return image if high < 256 else image.convert("I").point(lambda value: value * (1 / 257))  # type: ignore[operator]


def shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image in its aspect ratio with no more than `max_pixels` pixels; a smaller one stays as it is.

    Example:
        >>> shrink(Image.new("RGB", (400, 100)), 10_000).size
        (200, 50)
        >>> shrink(Image.new("RGB", (2000, 4)), 100).size
        (100, 1)
    """
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    share = math.sqrt(max_pixels / (width * height))
    narrow, wide = sorted((max(int(width * share), 1), max(int(height * share), 1)))
    wide = min(wide, max_pixels // narrow)
    return image.resize((wide, narrow) if width > height else (narrow, wide), Image.Resampling.BICUBIC)


def open_image_bytes(content: bytes, name: str) -> Image.Image:
    """An image that lies in a data set as encoded bytes; `name` is what messages to the user call it.

    Raises:
        RunError: The bytes are not an image.
    """
    try:
        opened = Image.open(io.BytesIO(content))
    except MemoryError:
        raise
    except Exception:  # as for files
        raise RunError(f"{shortened(name, _LONGEST_NAME)}: cannot be read as an image") from None
    opened.filename = name
    return opened


def messages_from_turns(turns: Sequence[dict[str, Any]], media: Sequence[str] = ("image",)) -> list[Message]:
    r"""Messages from turns as data sets write them.

    Understood are `{"role", "content"}`, where the content is a string or a list of parts, and LLaVA's
    `{"from": "human" | "gpt", "value"}`. In strings `<image>` marks the place of an image; line breaks beside it are
    left out, since chat templates bring their own. Where there are videos and no images it marks a video, as
    LLaVA-Video's data have it.

    Args:
        turns: The turns, each of one speaker (`plain_turns`).
        media: Of which kinds, of `MEDIA`, there are files; in strings placeholders of others are ordinary characters.

    Raises:
        ValueError: A turn is of neither form.

    Example:
        >>> messages_from_turns([{"from": "human", "value": "<image>\nWhat is it?"}])
        [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}]
    """
    messages: list[Message] = []
    words = {kind: kind for kind in media}
    if "video" in words and "image" not in words and not any("<video>" in str(turn) for turn in turns):
        words["image"] = "video"
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is {type(turn).__name__}, not an object")
        speaker, content = speaker_of(turn), text_of(turn)
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise ValueError(f"turn {number} has the role {speaker!r}, expected one of {', '.join(ROLES)}")
        if isinstance(content, str):
            parts = _parts_from_text(content, words)
        elif isinstance(content, (list, tuple)):
            # Columnar files fill the keys that a part does not have with None.
            parts = [_part(part, number, {"image", *media}) for part in content]
        else:
            raise ValueError(f"turn {number} has no text")
        messages.append({"role": ROLES[speaker], "content": parts})
    if not messages:
        raise ValueError("the conversation is empty")
    texts = (part.get("text", "") for message in messages for part in message["content"])
    if not media and not any(map(str.strip, texts)):
        raise ValueError("nothing is said in the conversation")
    return messages


def place_media(messages: list[Message], files: Sequence[File], kind: str = "image") -> list[File]:
    """Give messages exactly one part of a kind for each file: those without a placeholder come first, in the first user
    turn. Where there is no other, numbered placeholders of the user (`<image 2>`) are the places of these files.

    Args:
        messages: The messages; changed where they are.
        files: The files, as the record names them.
        kind: `image`, `video` or `audio`.

    Returns:
        The files in the order of the parts.

    Raises:
        ValueError: There are more placeholders than files, or one of a number that no file has.

    Example:
        >>> said = [{"role": "user", "content": [{"type": "text", "text": "Is <image 2> like <image 1>?"}]}]
        >>> place_media(said, ["a.png", "b.png"]), [part.get("text") for part in said[0]["content"]]
        (['b.png', 'a.png'], ['Is ', None, ' like ', None, '?'])
    """
    placeholders = sum(part["type"] == kind for message in messages for part in message["content"])
    files = list(files)
    if files and not placeholders:
        numbers = _take_numbered(messages, kind)
        first = min([1, *numbers])
        if numbers and max(numbers) - first >= len(files):
            raise ValueError(f"a placeholder stands for {kind} {max(numbers)}, and the record names {len(files)}")
        placed = [number - first for number in numbers]
        files = [file for place, file in enumerate(files) if place not in placed] + [files[place] for place in placed]
        placeholders = len(placed)
    if placeholders > len(files):
        raise ValueError(f"more {kind} placeholders ({placeholders}) than {kind}s ({len(files)})")
    if placeholders < len(files):
        first_turn = next((message for message in messages if message["role"] == "user"), messages[0])
        first_turn["content"] = [{"type": kind}] * (len(files) - placeholders) + first_turn["content"]
    return files


def _take_numbered(messages: list[Message], kind: str) -> list[int]:
    """Make parts of the numbered placeholders of a kind; of those of one number only the first is a place."""
    numbers: dict[int, None] = {}
    for message in messages:
        if message["role"] != "user":
            continue
        content = []
        for part in message["content"]:
            text, start = part.get("text", ""), 0
            for one in placeholders_in(text):
                if one.kind == kind and one.number is not None and one.number not in numbers:
                    numbers[one.number] = None
                    content += [*_text(text[start : one.start], start > 0, True), {"type": kind}]
                    start = one.end
            content += _text(text[start:], True, False) if start else [part]
        message["content"] = content
    return [*numbers]


def kind_of_part(part: Mapping[str, Any]) -> str:
    """`text`, `image`, `video` or `audio`, under whatever name a chat format has it; as it is if it is none of them.

    Example:
        >>> [kind_of_part({"type": name}) for name in ("image_url", "input_audio", "output_text", "tool_use")]
        ['image', 'audio', 'text', 'tool_use']
    """
    name = part.get("type")
    plain = re.sub(r"^(input|output)_|_(url|path|file)$", "", name) if isinstance(name, str) else name
    return plain if plain in ("text", *MEDIA) else name  # type: ignore[return-value]


def _parts_from_text(text: str, words: Mapping[str, str]) -> list[dict[str, Any]]:
    """Text, and a part of the kind that it stands for in the place of each word in angle brackets."""
    parts: list[dict[str, Any]] = []
    # With a group in the pattern, every other piece is the name of a placeholder.
    pieces = re.split(f"<({'|'.join(words)})>", text) if words else [text]
    for number, piece in enumerate(pieces):
        parts += [{"type": words[piece]}] if number % 2 else _text(piece, number > 0, number < len(pieces) - 1)
    return parts


def _text(text: str, behind: bool, before: bool) -> list[dict[str, Any]]:
    """The part of a text, or none; without the line breaks beside a placeholder that it stands behind or before."""
    text = text.lstrip("\n") if behind else text
    text = text.rstrip("\n") if before else text
    return [{"type": "text", "text": text}] if text else []


def _part(part: Any, turn: int, media: Collection[str]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = kind_of_part(part) if isinstance(part, dict) else None
    if kind in media:
        return {"type": kind}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    expected = " or ".join(("text", *(one for one in MEDIA if one in media)))
    raise ValueError(f"turn {turn} has a part of type {kind!r}, expected {expected}")
