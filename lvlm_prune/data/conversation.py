"""What a calibration sample is before the model's processor has seen it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from lvlm_prune.errors import RunError

Message = dict[str, Any]
"""One turn in Hugging Face's chat format: `{"role": ..., "content": [{"type": "text", "text": ...}, ...]}`."""

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Conversation:
    """Chat messages and the images that their placeholders stand for.

    Args:
        messages: Turns in Hugging Face's chat format; every image is a part `{"type": "image"}` of its turn's content.
        images: One per image part, in order: an opened image, or a path that is opened when the sample is encoded.
        id: Name of the sample in messages to the user.
    """

    messages: list[Message]
    images: list[Image.Image | Path] = field(default_factory=list)
    id: str = ""


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


def load_image(image: Image.Image | Path) -> Image.Image:
    """The image, upright and in RGB, as transformers' own loader would give it.

    Raises:
        RunError: The file is missing or is not an image.
    """
    name = (getattr(image, "filename", "") or "image") if isinstance(image, Image.Image) else str(image)
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise RunError(f"{name}: no such image file") from None
    # Pillow reports broken PNGs as SyntaxError and absurd sizes as DecompressionBombError.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if "cannot identify" in str(error) else str(error)
        raise RunError(f"{name}: cannot be read as an image ({reason})") from None


def open_image_bytes(content: bytes, name: str) -> Image.Image:
    """An image that lies in a data set as encoded bytes; `name` is what messages to the user call it.

    Raises:
        RunError: The bytes are not an image.
    """
    try:
        opened = Image.open(io.BytesIO(content))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise RunError(f"{name}: cannot be read as an image") from None
    opened.filename = name
    return opened


def messages_from_turns(turns: Sequence[dict[str, Any]]) -> list[Message]:
    r"""Messages from turns as data sets write them.

    Understood are `{"role", "content"}`, where the content is a string or a list of parts, and LLaVA's
    `{"from": "human" | "gpt", "value"}`. In strings `<image>` marks the place of an image; line breaks beside it are
    left out, since chat templates bring their own.

    Raises:
        ValueError: A turn is of neither form.

    Example:
        >>> messages_from_turns([{"from": "human", "value": "<image>\nWhat is it?"}])
        [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}]
    """
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is {type(turn).__name__}, not an object")
        speaker = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if speaker not in _ROLES:
            raise ValueError(f"turn {number} has the role {speaker!r}, expected one of {', '.join(_ROLES)}")
        if isinstance(content, str):
            parts = _parts_from_text(content)
        elif isinstance(content, (list, tuple)):
            # Columnar files fill the keys that a part does not have with None.
            parts = [_part(part, number) for part in content]
        else:
            raise ValueError(f"turn {number} has no text")
        messages.append({"role": _ROLES[speaker], "content": parts})
    if not messages:
        raise ValueError("the conversation is empty")
    return messages


def place_images(messages: list[Message], count: int) -> list[Message]:
    """Messages with exactly `count` image parts: those without a placeholder are put first in the first user turn.

    Raises:
        ValueError: There are more placeholders than images.
    """
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders > count:
        raise ValueError(f"more image placeholders ({placeholders}) than images ({count})")
    if placeholders < count:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * (count - placeholders) + first["content"]
    return messages


def _parts_from_text(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    pieces = text.split(IMAGE_PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append({"type": "image"})
            piece = piece.lstrip("\n")
        if number < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _part(part: Any, turn: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise ValueError(f"turn {turn} has a part of type {kind!r}, expected text or image")
