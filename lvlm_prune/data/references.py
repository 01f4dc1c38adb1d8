"""Where a record says that its images, videos and sounds are, in the ways in which data sets write it.

    {"image": "a.jpg"}   {"images": ["a.jpg", {"path": "b.jpg"}]}                      beside the conversation
    {"image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}}                          so too, with its places
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBOR..."}}      in a part of a turn

A file name, an image as a data URI, or one that is nothing but base64. Addresses are not followed.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os.path import isfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from lvlm_prune.data.conversation import MEDIA, kind_of_part, open_image_bytes
from lvlm_prune.data.overlooked import key_of_reference, refuse_overlooked
from lvlm_prune.data.placeholders import placeholders_in
from lvlm_prune.data.turns import text_of
from lvlm_prune.errors import LONGEST_FILE_NAME, RunError, shortened

_ENTRY = ("bytes", "data", "url", "path")  # keys of an object that is an image or names one
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}\s*")


def references_of_record(record: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a record names under `image` or `images`, `video` or `videos`, `audio` or `audios`, kind by kind.

    Raises:
        ValueError: An entry is no name and no list of names.

    Example:
        >>> references_of_record({"images": ["a.jpg", "b.jpg"], "video": None})
        {'image': ['a.jpg', 'b.jpg'], 'video': [], 'audio': []}
    """
    return {kind: _named(record, kind) for kind in MEDIA}


def with_images_in_order(record: Mapping[str, Any], turns: Sequence[Any]) -> tuple[Mapping[str, Any], list[Any]]:
    """A record whose images are numbered by their keys, as MiniCPM-V's are, with a list of them and places that count
    from 1; others as they are.

    Args:
        record: The record.
        turns: Its turns.

    Raises:
        ValueError: A number is left out.

    Example:
        >>> turns = [{"role": "user", "content": "Is <image_01> like <image_00>?"}]
        >>> with_images_in_order({"image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}}, turns)
        ({'image': ['a.jpg', 'b.jpg']}, [{'role': 'user', 'content': 'Is <image 2> like <image 1>?'}])
    """
    images = record.get("image")
    if not isinstance(images, Mapping):
        return record, [*turns]
    numbers = {key: one.number for key in images for one in placeholders_in(str(key)) if one.end == len(key)}
    if len(numbers) < len(images) or None in numbers.values():
        return record, [*turns]
    ordered = sorted(images, key=lambda key: numbers[key] or 0)
    if [numbers[key] for key in ordered] not in ([*range(len(ordered))], [*range(1, len(ordered) + 1)]):
        raise ValueError(f"`image` leaves out a number: {shortened(', '.join(ordered))}")
    place = {key: f"<image {number}>" for number, key in enumerate(ordered, 1)}
    pattern = re.compile("|".join(map(re.escape, place)))

    def renumbered(turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        said = text_of(turn)
        new = [in_part(part) for part in said] if isinstance(said, (list, tuple)) else in_part(said)
        return {**turn, **{key: new for key in ("content", "value") if turn.get(key)}}

    def in_part(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub(lambda found: place[found[0]], part)
        return {**part, "text": in_part(part["text"])} if isinstance(part, Mapping) and "text" in part else part

    return {**record, "image": [images[key] for key in ordered]}, [renumbered(turn) for turn in turns]


def _named(record: Mapping[str, Any], kind: str) -> list[Any]:
    given = [key for key in (kind, f"{kind}s") if record.get(key)]
    if len(given) > 1:
        if record[kind] in (record[f"{kind}s"], *record[f"{kind}s"]):
            return _as_list(record, f"{kind}s")
        raise ValueError(f"`{kind}` and `{kind}s` name different {kind}s")
    return _as_list(record, given[0]) if given else []


def _as_list(record: Mapping[str, Any], key: str) -> list[Any]:
    entries = record[key]
    entries = list(entries) if isinstance(entries, (list, tuple)) else [entries]
    names = [_reference_of_entry(one) if isinstance(one, Mapping) else one for one in entries]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{key}` is neither a file name nor a list of file names")
    for entry, name in zip(entries, names):
        if isinstance(entry, Mapping):
            refuse_overlooked(entry, _ENTRY, {"image": [name], "video": [], "audio": []})
    return names


def references_of_turns(turns: Sequence[Any]) -> dict[str, list[Any]]:
    """What the parts of turns name themselves, kind by kind, in order.

    Raises:
        ValueError: Of the parts of a kind some name a file and some do not.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in MEDIA}
    for turn in turns:
        content = text_of(turn) if isinstance(turn, dict) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, dict) and (kind := kind_of_part(part)) in MEDIA:
                found[kind].append(_reference_of_part(part))
    for kind, references in found.items():
        if None in references:
            if any(reference is not None for reference in references):
                raise ValueError(f"some parts of type {kind} name their {kind}, and some do not")
            references.clear()
    return found


def _reference_of_part(part: Mapping[str, Any]) -> Any:
    value = part.get(key_of_reference(part))
    return (_reference_of_entry(value) if isinstance(value, Mapping) else value) or None


def _reference_of_entry(entry: Mapping[str, Any]) -> Any:
    """What an object says that an image is: itself rather than its name, a name rather than an address."""
    given = [(key, entry[key]) for key in _ENTRY if entry.get(key)]
    here = (one for one in given if not str(one[1])[:8].startswith(("http://", "https://")))
    key, value = next(here, (*given, ("", None))[0])
    is_base64 = key == "bytes" and isinstance(value, str) and not value.startswith("data:")
    return f"data:;base64,{value}" if is_base64 else value


def opened(reference: Any, kind: str, folder: Path, name: str = "") -> Path | Image.Image:
    """What a reference stands for: a path, or an image that the record holds itself.

    Args:
        reference: A file name, a data URI, base64 or an image.
        kind: `image`, `video` or `audio`.
        folder: Where file names begin.
        name: What messages call an image without a name.

    Raises:
        ValueError: An address, or nothing that is understood.
        RunError: Data that are no image.
    """
    if kind == "image" and isinstance(reference, Image.Image):
        return reference
    if kind == "image" and isinstance(reference, bytes):
        return open_image_bytes(reference, name or "an image")
    if not isinstance(reference, str):
        raise ValueError(f"{type(reference).__name__} where the name of a file of type {kind} is expected")
    scheme = urlsplit(reference[:LONGEST_FILE_NAME]).scheme if ":" in reference[:16] else ""
    if scheme in ("http", "https", "ftp", "s3", "gs"):
        raise ValueError(f"{shortened(reference)} is an address; download the {kind} and name the file")
    if scheme == "file":
        return Path(unquote(urlsplit(reference).path))
    if scheme == "data":
        if kind != "image":
            raise ValueError(f"a {kind} as data in the record is not understood; name a file")
        return open_image_bytes(_decoded(reference.partition(",")[2]), name or "an image")
    if "\0" in reference:
        raise ValueError("a file name holds a zero byte")
    path = folder / reference
    if kind == "image" and len(reference) > LONGEST_FILE_NAME and _BASE64.fullmatch(reference) and not isfile(path):
        with suppress(ValueError, RunError):
            return open_image_bytes(_decoded(reference), name or "an image")
    return path


def _decoded(text: str) -> bytes:
    try:
        # Both alphabets, with or without the fill at the end.
        plain = re.sub(r"\s", "", unquote(text)).rstrip("=").replace("-", "+").replace("_", "/")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{shortened(text)} is no base64 ({error})") from None
