"""Media of a record that nobody reads: told by what a key is called and by what stands there, at any depth.

{"image": "a.png", "image_2": "b.png"}                      another image: refused
{"image": "a.png", "image_url": "https://...", ...}         says where the same image comes from
{"from": "human", "value": "...", "image": "a.png"}         within a turn: refused
{"metadata": {"source": "b.png"}}                           the only image there is: refused
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_prune.data.conversation import MEDIA, Message, kind_of_part
from lvlm_prune.data.placeholders import names_in, placeholders_in
from lvlm_prune.data.turns import speaker_of, text_of
from lvlm_prune.errors import LONGEST_FILE_NAME, shortened

log = logging.getLogger(__name__)

_LOOKS_LIKE_MEDIA = re.compile(
    r"(([a-z]+_){0,2}(image|img|picture|pic|photo|screenshot|video|audio)s?|(key_)?(media|clip|frame|sound|speech|visual)s?"
    r"|jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mov|webm|wav|mp3|flac|ogg)"
    r"(_?(\d+|(path|file|filename|name|url|uri|link|list|byte|b64|base64|data|binary|frame|clip|local|abs|absolute|rel"
    r"|relative|full)s?))*"
)
TENSORS = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio", "input_values": "audio"}
"""What a processor makes of media, and of which kind."""

_KINDS = dict.fromkeys(("video", "clip", "frame", "mp4", "avi", "mov", "webm"), "video")
_KINDS |= dict.fromkeys(("audio", "sound", "speech", "wav", "mp3", "flac", "ogg"), "audio")
_LONGEST_KEY = 60

_SUFFIXES = {
    "image": "png|jpe?g|jpe|jfif|webp|gif|bmp|tiff?|hei[cf]|avif|jp2|p[pgn]m|svg",
    "video": "mp4|m4v|avi|mov|webm|mkv|mpe?g|flv|wmv|3gp|ogv",
    "audio": "wav|mp3|flac|og[ga]|m4a|aac|opus|wma|aiff?",
}
_ANY_SUFFIX = "|".join(f"(?P<{kind}>{suffixes})" for kind, suffixes in _SUFFIXES.items())
# A name or an address; behind an address parameters may follow.
_FILE = re.compile(rf"(?:\S| (?! ))+\.(?:{_ANY_SUFFIX})(?:[?#]\S*)?", re.IGNORECASE)
_MOST_WORDS = 4  # of a file name; a longer text only ends in one
_DATA = re.compile(r"data:(image|video|audio)/")
_ENCODED = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # how PNG, JPEG, GIF and WebP begin in base64
_MAGIC = {b"\x89PNG": "image", b"\xff\xd8\xff": "image", b"GIF8": "image", b"BM": "image", b"II*\0": "image"}
_MAGIC |= {b"MM\0*": "image", b"ID3": "audio", b"fLaC": "audio", b"OggS": "audio"}

# A key with one of the first words, and for the rest of the second, says where the media that are read come from.
_DESCRIBING = re.compile(
    "file|filename|filepath|path|name|imgname|imagename|imgid|imageid|ur[li]s?|links?|href|src|sources?|origin|id|title|caption|label|thumb|thumbnail"
)
_OTHER_WORD = re.compile(
    "image|img|picture|photo|pic|video|audio|media|original|orig|coco|flickr|raw|full|local|abs|absolute|rel|relative"
    "|web|page|download|remote|question|sample|item|record|row|data|dataset|doc|document"
)
_MARKUP = re.compile(r"</(image|img|video|audio|body|div|p|a)>|\bhtml", re.IGNORECASE)
# As Qwen-VL has them.
_NAMED = re.compile(r"<(image|img|video|audio)>([^<>]++)</\1>", re.IGNORECASE)
# Keys of a file, where nothing else says that a name is one that is to be read; of text, which may speak of files; and
# of much else than media.
_OF_FILES = re.compile("files?|filenames?|filepaths?|paths?|src|sources?|ur[il]s?|href|links?")
_OF_MEDIA = re.compile("(image|img|picture|photo|screenshot|video|audio|attachment|figure)s?")
_ABOUT_TEXT = re.compile(
    "answers?|questions?|captions?|texts?|titles?|labels?|choices|options?|hints?|contexts?|instructions?|inputs?"
    "|outputs?|responses?|prompts?|tags?|keywords?|categor(y|ies)|tokens?|objects?|notes?|comments?"
)
# Keys that say which medium is meant, and a name without its suffix: no number; `fig_12` is in the text itself.
_SAYS_WHICH = re.compile("(image|img|picture|photo|video|audio)_?ref(erence)?s?", re.IGNORECASE)
_SAYS_WHERE = re.compile("(figure|fig)s?", re.IGNORECASE)
_WHICH = re.compile(r"(?!n/a|https?:)(?=.*\d)(?=.*[^\d\W])[\w./\\-]{5,}", re.IGNORECASE)
_OF_OTHER_THINGS = {"clip", "clips", "frame", "sound", "sounds", "speech", "visual", "media"}
_CONTENTS = ("path", "bytes", "data", "base64", "b64")
_ENTRIES = (*_CONTENTS, "file", "file_name", "filename", "name", "url", "uri", "src")
_PLAIN = (*MEDIA, *(f"{kind}s" for kind in MEDIA), "img", "imgs")
_NOTHING = ("none", "null", "nan", "n/a", "no", "false", "0")


def kind_of_key(key: str) -> str | None:
    """`image`, `video` or `audio` where a key sounds as if media were under it; else None.

    Example:
        >>> [kind_of_key(key) for key in ("image_0", "main_image", "img_b64", "frames", "image_id", "imagination")]
        ['image', 'image', 'image', 'video', None, None]
        >>> [kind_of_key(key) for key in ("image_file_name", "imageFilePath", "video-frames", "jpg", "part_of_speech")]
        ['image', 'image', 'video', 'image', None]
    """
    plain = key.lower().replace("-", "_")
    if len(plain) > _LONGEST_KEY or _LOOKS_LIKE_MEDIA.fullmatch(plain) is None:
        return None
    return next((kind for word, kind in _KINDS.items() if word in plain), "image")


def kind_of_value(value: Any) -> str | None:
    """`image`, `video` or `audio` where a value is a medium or names one, by its suffix or its content; else None.

    Example:
        >>> [kind_of_value(value) for value in ("a/b.JPG", "https://x.org/a.mp4?t=1", "data:audio/wav;base64,U")]
        ['image', 'video', 'audio']
        >>> [kind_of_value(value) for value in ("a.json", "What does the sign say in a.png", b"GIF89", b"a")]
        [None, None, 'image', None]
    """
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, (bytes, bytearray)):
        content = bytes(value[:12])
        if content[:4] == b"RIFF":
            return {b"WAVE": "audio", b"AVI ": "video"}.get(content[8:], "image")
        return "video" if content[4:8] == b"ftyp" else next((_MAGIC[m] for m in _MAGIC if content.startswith(m)), None)
    if not isinstance(value, str):
        return None
    if found := _DATA.match(value):
        return found[1]
    if value.startswith(_ENCODED) and len(value) > 40 and not re.search(r"[^\w+/=\s-]", value):
        return "image"
    text = value.strip()
    if len(text) > 4 * LONGEST_FILE_NAME or text.count(" ") >= _MOST_WORDS or not (found := _FILE.fullmatch(text)):
        return None
    return found.lastgroup


@dataclass(frozen=True)
class _Value:
    """Something that stands in a record.

    Args:
        place: Its keys, from the outermost.
        value: No mapping and no list.
        key: The key that says what it is: the last one, or the one above an entry like `path`.
        kind: What that key sounds like; None where it says nothing.
    """

    place: tuple[str, ...]
    value: Any
    key: str
    kind: str | None


def refuse_overlooked(record: Mapping[str, Any], read: Collection[str], found: Mapping[str, Sequence[Any]]) -> None:
    """Refuse media under keys that are not read.

    What describes the media that are read is no obstacle: their name under another key, an address, a number.

    Args:
        record: What a record holds, or a turn, or a part of one.
        read: Keys that are read.
        found: Kind -> what was found under these, in the whole record.

    Raises:
        ValueError: There are some; names the key.
    """
    for key, value in record.items():
        if key in TENSORS and value and key not in read and not any(found.values()):
            raise ValueError(f"`{key}` is what a processor makes of media; name the files, or use TensorSource")
        for one in () if key in read else _values_within(value, (str(key),), str(key)):
            kind = _overlooked(one, found)
            if kind is not None:
                named = "`" + ".".join(one.place) + "`"
                raise ValueError(f"{shortened(named)} is not understood; `{kind}` or `{kind}s` names {kind}s")


def tell_of_files(
    record: Mapping[str, Any], read: Collection[str], found: Mapping[str, Sequence[Any]], folder: Path, told: set[str]
) -> None:
    """Say of files that are there, under keys that are not read, that they are left out: once for each key.

    Args:
        record: What a record holds that nobody refuses.
        read: Keys that are read.
        found: Kind -> what was found under these.
        folder: Where names of files begin.
        told: Keys of which it was said, to which more are added.
    """
    for key, value in record.items():
        for one in () if key in read or key in told else _values_within(value, (str(key),), str(key)):
            text = one.value.strip() if isinstance(one.value, str) else ""
            is_named = text.lower().endswith(".pdf") or kind_of_value(text) is not None
            if is_named and not _is_read(text, found) and isfile(folder / text):
                log.warning("`%s` names %s, which nobody reads; it is left out", ".".join(one.place), shortened(text))
                told.add(key)
                break


def refuse_overlooked_in_turns(turns: Sequence[Any], found: Mapping[str, Sequence[Any]]) -> None:
    """Refuse media in turns, and in the parts of their content, that are not read.

    Args:
        turns: Each of one speaker.
        found: Kind -> what was found, in the whole record.

    Raises:
        ValueError: There are some; names turn and key.
    """
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            continue
        parts = text_of(turn)
        try:
            refuse_overlooked(turn, ("role", "from", "content", "value"), found)
            for part in parts if isinstance(parts, (list, tuple)) else ():
                if isinstance(part, Mapping):
                    refuse_overlooked(part, ("type", "text", key_of_reference(part)), found)
                    _refuse_another(part)
                elif isinstance(part, str) and speaker_of(turn) not in ("assistant", "gpt"):
                    _refuse_name(part, found)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None


def key_of_reference(part: Mapping[str, Any]) -> str:
    """Where a part of a turn says which image, video or sound it is; empty where it does not, or is text."""
    return next((key for key in _references(part) if part.get(key)), "")


def _references(part: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys under which a part may say it, the first that does counts."""
    kind = kind_of_part(part)
    keys = (kind, f"{kind}_url", f"input_{kind}", f"{kind}_path", "url", "path", "file", "data")
    return keys if kind in MEDIA else ()


def _refuse_name(part: str, found: Mapping[str, Sequence[Any]]) -> None:
    kind = None if " " in part.strip() else kind_of_value(part)
    if kind is not None and not _is_read(part, found):
        problem = f"would be read as text; {{type: {kind}, {kind}: ...}} names a file"
        raise ValueError(f"the part {shortened(part)} {problem}")


def _refuse_another(part: Mapping[str, Any]) -> None:
    """Raise where a part names two files, of which one would be read; an address only says where that one is from."""
    given = [(key, part.get(key)) for key in _references(part)]
    inner = [
        (f"{key}.{name}", value.get(name)) for key, value in given if isinstance(value, Mapping) for name in _ENTRIES
    ]
    names = [(key, name) for key, name in given + inner if isinstance(name, str) and _only_names(name.strip())]
    (first, read), *others = [one for one in names if not one[1].startswith(("http://", "https://"))] or [("", "")]
    for key, name in others:
        if not _is_read(name, {"": [read]}):
            raise ValueError(f"`{key}` names another {kind_of_part(part)} than `{first}`")


def refuse_unfilled(messages: Sequence[Message], folder: Path, found: Sequence[Any] = ()) -> None:
    """Refuse text that shows what nobody reads: by a placeholder of nothing, or by the name of a file.

    Placeholders of files that were found are parts of their own by now. Text may speak of the others, as of elements of
    HTML: they count where data sets put them (see `placeholders`), and names where there is such a file.

    Args:
        messages: What is said.
        folder: Where names of files begin.
        found: The files that were found.

    Raises:
        ValueError: There is one; names it.

    Example:
        >>> def said(text): return [{"role": "user", "content": [{"type": "text", "text": text}]}]
        >>> refuse_unfilled(said("What does the <video> tag do?"), Path())
        >>> refuse_unfilled(said("<video>Who sings?"), Path())
        Traceback (most recent call last):
        ...
        ValueError: turn 0 has the placeholder <video>, and the record names no video for it
    """
    kinds = Counter(part["type"] for message in messages for part in message["content"])
    for number, message in enumerate(messages):
        if message["role"] == "assistant":  # what a model is to say stands for nothing that it is shown
            continue
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        named = next((one[0] for one in _NAMED.finditer(text) if kind_of_value(one[2])), None)
        if named := named or next((name for name in names_in(text) if _is_shown(name, folder, found)), None):
            raise ValueError(f"turn {number} names a file in its text, {shortened(named)}, which is not understood")
        for one in placeholders_in(text) if not _MARKUP.search(text) else ():
            if one.stands_for_something(text):
                shown = f"turn {number} has the placeholder {text[one.start : one.end]}"
                if (one.number or 1) > kinds[one.kind]:
                    raise ValueError(f"{shown}, and the record names no {one.kind} for it")
                if one.number is None:
                    raise ValueError(f"{shown}, which is not understood; <{one.kind}> marks the place of one")


def _is_shown(name: str, folder: Path, found: Sequence[Any]) -> bool:
    """Whether there is a file of this name with something to be shown, other than those that were found."""
    known = {_last_of(str(getattr(one, "filename", one))) for one in found}
    if kind_of_value(name) is None or _last_of(name) in known:
        return False
    return isfile(folder / re.sub(r"[?#].*$", "", name))


def _values_within(value: Any, place: tuple[str, ...], key: str) -> Iterator[_Value]:
    kind = kind_of_key(key)
    if isinstance(value, Mapping):
        for name, inner in value.items():
            is_entry = str(name).lower() in (_CONTENTS if kind is None else _ENTRIES)
            yield from _values_within(inner, (*place, str(name)), key if is_entry else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _values_within(inner, place, key)
    elif value is not None and not isinstance(value, (bool, int, float)):
        yield _Value(place, value, key, kind)


def _names_one(key: str, text: str) -> bool:
    """Whether a key says which medium a record is about, by a name without its suffix."""
    is_which = _SAYS_WHICH.fullmatch(key) or (_SAYS_WHERE.fullmatch(key) and re.search(r"[/\\]", text))
    return bool(is_which and _WHICH.fullmatch(text))


def _overlooked(one: _Value, found: Mapping[str, Sequence[Any]]) -> str | None:
    """The kind of a medium that would be overlooked; None for what is none, or describes one that is read."""
    held = kind_of_value(one.value)
    kind = one.kind if one.kind in ("video", "audio") else held or one.kind  # frames are images of a video
    text = one.value.strip() if isinstance(one.value, str) else ""
    if kind is None and not any(found.values()) and _names_one(one.key, text):
        return kind_of_key(re.sub("_?ref(erence)?s?$", "", one.key, flags=re.IGNORECASE)) or "image"
    if kind is None or not one.value or text.lower() in _NOTHING or _is_read(one.value, found):
        return None
    if any(found.values()) and _only_names(text):
        words = _words(one.key)
        others = [word for word in words if not _DESCRIBING.fullmatch(word)]
        describes = len(others) < len(words) and all(map(_OTHER_WORD.fullmatch, others))
        if one.kind is None and describes:
            return None
        if one.kind is not None and found[kind]:
            is_another = any(word.isdigit() for word in words)
            return None if describes or (held is None and not is_another) else kind
    if held is None and set(_words(one.key)) <= _OF_OTHER_THINGS:
        return None
    if one.kind is None and _only_names(text):
        words = _words(one.key)
        of_media = any(map(_OF_MEDIA.fullmatch, words)) and not any(map(_DESCRIBING.fullmatch, words))
        named_only = not any(found.values()) and not of_media and not any(map(_OF_FILES.fullmatch, words))
        if named_only or _ABOUT_TEXT.fullmatch(words[-1]) or text.startswith(("http://", "https://")):
            return None
    if held is not None:
        return kind
    # A key alone: deep inside only where it says so plainly, or of what may be a name.
    plain = len(one.place) == 1 or one.key.lower() in _PLAIN
    return kind if plain or (re.search(r"[\d./\\]", text) and " " not in text) else None


def _only_names(text: str) -> bool:
    """Whether a text is at most the name of a medium, not the medium itself."""
    return bool(text) and not text.startswith(_ENCODED) and not _DATA.match(text)


def _is_read(value: Any, found: Mapping[str, Sequence[Any]]) -> bool:
    """Whether it is one of those that are read, by the same name perhaps in another folder."""
    known = [one for kind in found.values() for one in kind]
    if not isinstance(value, str):
        return any(one is value or (type(one) is type(value) and one == value) for one in known)
    return _last_of(value) in {_last_of(one) for one in known if isinstance(one, str)}


def _last_of(name: str) -> str:
    return name if name.startswith("data:") else re.split(r"[/\\]", re.sub(r"[?#]\S*$", "", name.strip()))[-1]


def _words(key: str) -> list[str]:
    """The words of a key, in lower case.

    Example:
        >>> _words("imageFileName"), _words("image_url-2"), _words("IMG")
        (['image', 'file', 'name'], ['image', 'url', '2'], ['img'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)]
