"""Videos and sounds of conversations: whether the processor takes them, and what it needs to read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from typing import Any

from lvlm_prune.errors import InputError, RunError, why_no_file


def refuse_without_videos(processor: Any) -> None:
    """Raise where videos cannot be processed.

    Raises:
        RunError: The model takes none.
        InputError: The part of the processor that does is missing without torchvision.
    """
    if not any("video" in part for part in _parts(processor)):
        raise RunError(f"it has a video, and {type(processor).__name__} takes none")
    if getattr(processor, "video_processor", None) is None:
        problem = "a sample has a video, which this model's processor takes only where torchvision is installed"
        raise InputError("", type(processor).__name__, problem)


def load_sound(processor: Any, path: Path) -> Any:
    """The sound as one channel at the processor's sampling rate, a float32 array.

    Raises:
        RunError: The model takes none, or the file is missing or broken.
        InputError: No library that reads it is installed.
    """
    name = next((part for part in ("feature_extractor", "audio_processor") if part in _parts(processor)), None)
    if name is None:
        raise RunError(f"it has a sound, and {type(processor).__name__} takes none")
    if not isfile(path):
        raise RunError(f"{path}: {why_no_file(path)}")
    from transformers.audio_utils import load_audio

    with library_needed("a sound"):
        try:
            return load_audio(str(path), sampling_rate=getattr(processor, name).sampling_rate)
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"{path}: cannot be read as a sound ({' '.join(str(error).split())[:200]})") from None


@contextmanager
def library_needed(what: str) -> Iterator[None]:
    """What transformers raises without an optional library becomes one line.

    Raises:
        InputError: A library is missing.
    """
    try:
        yield
    except ImportError as error:
        said = " ".join(str(error).split())[:200]
        problem = f"reading it needs a library that is not installed: {said}"
        raise InputError("", f"a sample has {what}", problem) from error


def _parts(processor: Any) -> list[str]:
    """Names of what a processor consists of; none for a tokenizer."""
    return list(getattr(processor, "get_attributes", list)())
