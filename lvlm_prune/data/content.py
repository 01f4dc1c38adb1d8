"""What images, videos and sounds hold, told apart whatever they are called."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_prune.data.conversation import Conversation

# Of a longer file (a video) pieces from all over it are read, and its size.
_WHOLE, _PIECE, _PIECES = 2**24, 2**20, 16


def digests_of_media(sample: Conversation, known: dict[Path, str]) -> list[str]:
    """BLAKE2 of what each image, video and sound of a sample holds, in this order; nothing is decoded that is encoded.

    Args:
        sample: The sample.
        known: Digests of files, to which those of this sample are added: many questions are about one image.
    """
    found = []
    for medium in (*sample.images, *sample.videos, *sample.audios):
        if isinstance(medium, Path):
            if medium not in known:
                known[medium] = digest_of_file(medium)
            found.append(known[medium])
        else:
            found.append(_digest_of_image(medium))
    return found


def digest_of_file(path: Path) -> str:
    """Of the bytes of a file, or of its size and pieces of it where it is large; `unreadable` where it is."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size <= _WHOLE:
                return _digest(file.read())
            state = hashlib.blake2b(str(size).encode(), digest_size=16)
            for piece in range(_PIECES):
                file.seek((size - _PIECE) * piece // (_PIECES - 1))
                state.update(file.read(_PIECE))
            return state.hexdigest()
    except OSError:
        return "unreadable"


def _digest_of_image(image: Image.Image) -> str:
    """Of its encoded bytes where it was opened from some, else of its pixels."""
    file: Any = getattr(image, "fp", None)
    if isinstance(file, BytesIO):
        return _digest(file.getvalue())
    try:
        return _digest(f"{image.mode} {image.size}".encode() + image.tobytes())
    except Exception:  # of Pillow's decoders, in all kinds
        return "unreadable"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
