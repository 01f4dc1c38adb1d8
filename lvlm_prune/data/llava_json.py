"""Conversations about images in the files of LLaVA, ShareGPT4V and their many descendants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlm_prune.data.conversation import MEDIA, Conversation, messages_from_turns, place_media
from lvlm_prune.data.json_records import JsonRecords
from lvlm_prune.data.source import CalibrationSource, verify_files
from lvlm_prune.errors import RunError


class LlavaJsonSource(CalibrationSource):
    r"""LLaVA's JSON or JSONL, of any size: the file is indexed, not loaded.

    A sample is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."}]}`. `image` may be a list, or missing in a sample of text only; images that no
    `<image>` stands for are put first. `video` with `<video>` and `audio` with `<audio>` are the same, for models whose
    processor takes them.

    Args:
        path: The file: a JSON array, or one JSON object per line.
        image_folder: Folder that the names of images, videos and sounds are relative to. Default: the folder of `path`.
    """

    def __init__(self, path: str, image_folder: str | None = None) -> None:
        self.path = path
        self.image_folder = image_folder
        self._records: JsonRecords | None = None

    def setup(self) -> None:
        if self._records is None:
            if self.image_folder is not None and not Path(self.image_folder).is_dir():
                raise ValueError(f"`image_folder` {self.image_folder}: no such folder")
            self._records = JsonRecords(self.path)

    def verify(self, indices: Sequence[int]) -> None:
        if self.image_folder is None:
            verify_files(self, indices, "path", self.path, hint="; is `image_folder` needed?")
        else:
            verify_files(self, indices, "image_folder", self.image_folder)

    def __len__(self) -> int:
        self.setup()
        assert self._records is not None
        return len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        self.setup()
        assert self._records is not None
        try:
            record = self._records[index]
            files = {kind: self._files(record, kind) for kind in MEDIA}
            turns = record.get("conversations")
            if not isinstance(turns, list):
                raise ValueError(f"no list `conversations`, only the keys {', '.join(record) or '(none)'}")
            # A sample of images may speak of `<video>`.
            media = [kind for kind in MEDIA if files[kind] or kind == "image"]
            messages = messages_from_turns(turns, media)
            for kind in media:
                messages = place_media(messages, len(files[kind]), kind)
        except ValueError as error:
            raise RunError(str(error)) from None
        name, task = str(record.get("id", index)), str(record.get("task") or "")
        return Conversation(messages, [*files["image"]], name, files["video"], files["audio"], task)

    def _files(self, record: dict[str, Any], kind: str) -> list[Path]:
        names = record.get(kind) or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`{kind}` is neither a file name nor a list of file names")
        folder = Path(self.path).parent if self.image_folder is None else Path(self.image_folder)
        return [folder / name for name in names]
