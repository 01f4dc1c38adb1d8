"""Conversations about images in the files of LLaVA, ShareGPT4V and their many descendants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lvlm_prune.data.conversation import (
    MEDIA,
    Conversation,
    messages_from_turns,
    place_media,
    task_name,
)
from lvlm_prune.data.json_records import JsonRecords
from lvlm_prune.data.overlooked import refuse_overlooked, refuse_overlooked_in_turns, refuse_unfilled, tell_of_files
from lvlm_prune.data.references import opened, references_of_record, references_of_turns, with_images_in_order
from lvlm_prune.data.source import CalibrationSource, SampleError, verify_files
from lvlm_prune.data.turns import plain_turns, system_text, with_system

_TURNS = ("conversations", "messages")
_PAIRS = ("texts",)  # turns of the Cauldron, unless there are others
_OWN_KEYS = ("id", "task", *MEDIA, *(f"{kind}s" for kind in MEDIA))


class LlavaJsonSource(CalibrationSource):
    r"""LLaVA's JSON or JSONL, of any size: the file is indexed, not loaded.

    A sample is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."}]}`. `image` may be a list, or missing in a sample of text only; images that no
    `<image>` stands for are put first, those of numbered ones (`<image 2>`) in their places. `video` with `<video>` and
    `audio` with `<audio>` are the same, for models whose processor takes them. `images`, `videos` and `audios` are
    understood too, objects for names (`{"path": ...}`), images by their places (`{"<image_00>": "a.jpg", ...}`), turns
    under `messages`, turns of two (`{"user": ..., "assistant": ...}`, also under `texts`), `system` beside the turns,
    parts that name their files (`{"type": "image_url", "image_url": {"url": ...}}`), and images as data URIs or base64.
    A record with media in any other place, or with a placeholder and no file for it, is an error.

    Args:
        path: The file: a JSON array, or one JSON object per line.
        image_folder: Folder that the names of images, videos and sounds are relative to. Default: the folder of `path`.
    """

    def __init__(self, path: str, image_folder: str | None = None) -> None:
        self.path = path
        self.image_folder = image_folder
        self._records: JsonRecords | None = None
        self._told: set[str] = set()

    def setup(self) -> None:
        if self._records is None:
            if self.image_folder is not None and not Path(self.image_folder).is_dir():
                raise ValueError(f"`image_folder` {self.image_folder}: no such folder")
            self._records = JsonRecords(self.path)

    def verify(self, indices: Sequence[int]) -> None:
        hint = "; is `image_folder` needed?" if self.image_folder is None else ""
        verify_files(self, indices, self.path, self.image_folder, hint)

    def __len__(self) -> int:
        self.setup()
        assert self._records is not None
        return len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        self.setup()
        assert self._records is not None
        own = ""
        try:
            record: Mapping[str, Any] = self._records[index]
            own = str(record.get("id", ""))
            name = own or str(index)
            record, turns = with_images_in_order(record, plain_turns(_turns(record)))
            files = self._files(record, turns, name)
            # A sample of images may speak of `<video>`.
            messages = messages_from_turns(turns, [kind for kind in MEDIA if files[kind]])
            files = {kind: place_media(messages, files[kind], kind) for kind in MEDIA}
            refuse_unfilled(messages, self._folder, [*chain(*files.values())])
            messages = with_system(messages, system_text(record))
            task = task_name(record.get("task"))
        except ValueError as error:
            raise SampleError(str(error), own) from None
        return Conversation(messages, [*files["image"]], name, files["video"], files["audio"], task)

    @property
    def _folder(self) -> Path:
        return Path(self.path).parent if self.image_folder is None else Path(self.image_folder)

    def _files(self, record: Mapping[str, Any], turns: list[Any], name: str) -> dict[str, list[Any]]:
        """Kind -> what is named beside the turns, or in them."""
        beside, within = references_of_record(record), references_of_turns(turns)
        for kind in MEDIA:
            if beside[kind] and within[kind]:
                raise ValueError(f"{kind}s are named beside the turns and in them")
        found = {kind: beside[kind] or within[kind] for kind in MEDIA}
        own = _TURNS if any(record.get(key) is not None for key in _TURNS) else _PAIRS
        refuse_overlooked(record, (*own, *_OWN_KEYS), found)
        tell_of_files(record, (*own, *_OWN_KEYS), found, self._folder, self._told)
        refuse_overlooked_in_turns(turns, found)
        return {kind: [opened(one, kind, self._folder, f"an image of {name}") for one in found[kind]] for kind in MEDIA}


def _turns(record: Mapping[str, Any]) -> list[Any]:
    given = [record[key] for key in _TURNS if record.get(key) is not None]
    given = given or [record[key] for key in _PAIRS if isinstance(record.get(key), list)]
    if len(given) == 2 and given[1] and given[0] != given[1]:
        raise ValueError("`conversations` and `messages` hold different turns")
    if not given or not isinstance(given[0], list):
        has_columns = {"question", "answer"} <= record.keys() or "text" in record
        way_out = " (HFDatasetSource takes such columns)" if has_columns else ""
        raise ValueError(f"no list `conversations`, only the keys {', '.join(record) or '(none)'}{way_out}")
    return given[0]
