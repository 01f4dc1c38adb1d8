"""Any Hugging Face data set, on disk or from the hub."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_prune.data.conversation import (
    MEDIA,
    Conversation,
    Document,
    Message,
    messages_from_turns,
    open_image_bytes,
    place_media,
    task_name,
)
from lvlm_prune.data.overlooked import (
    TENSORS,
    kind_of_key,
    refuse_overlooked,
    refuse_overlooked_in_turns,
    refuse_unfilled,
    tell_of_files,
)
from lvlm_prune.data.references import opened, references_of_turns
from lvlm_prune.data.source import CalibrationSource, SampleError, verify_files
from lvlm_prune.data.turns import plain_turns, system_text, with_system
from lvlm_prune.errors import RunError, first_line, why_no_file

log = logging.getLogger(__name__)

_ROLES = ("image", "images", "question", "answer", "messages", "system", "text", "id", "task")
_SAID = {"messages", "text", "question", "answer"}
_TURNS = ("conversations", "texts")  # columns of turns where there are none of these names, as the Cauldron has them
_NUMBERS = ("bool", "int", "uint", "float", "null")  # a column of these only counts or describes
_FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


class HFDatasetSource(CalibrationSource):
    """Samples of a Hugging Face data set, with a mapping that says which column plays which role.

    Roles: `image` or `images` (one image or a list: data of the `Image` feature, encoded bytes, or a file name relative
    to the data set), with `question` and `answer`; or `messages` (chat format, or LLaVA's `from`/`value`) with or
    without images; or `text` (a document, which does not go through the chat template); and `id`, and `task` (what a
    sample is scored under in an evaluation).

    Args:
        path: A folder written by `save_to_disk`, a folder or file of parquet, JSON, JSONL, CSV or images, or the name
            of a data set on the hub.
        name: Configuration of the data set.
        split: Which split.
        columns: From role to column. Default: the columns that are named like a role, and `conversations` or `texts`
            (turns of two, `{"user": ..., "assistant": ...}`) for messages.
        data_files: Files inside the data set, as `datasets.load_dataset` takes them.
        revision: Version on the hub.
        max_tokens: Documents are cut off after that many tokens.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        columns: dict[str, str] | None = None,
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        max_tokens: int = 2048,
    ) -> None:
        unknown = sorted(set(columns or ()) - set(_ROLES))
        if unknown:
            problem = f"no such role; there are {', '.join(_ROLES)}"
            raise ValueError(f"`columns` {unknown[0]}: {problem}")
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` {max_tokens}: must be at least 1")
        self.path = path
        self.name = name
        self.split = split
        self.columns = columns
        self.data_files = data_files
        self.revision = revision
        self.max_tokens = max_tokens
        self._roles: dict[str, str] = {}
        self._rows: Any = None
        self._told: set[str] = set()

    def setup(self) -> None:
        if self._rows is not None:
            return
        rows = self._load()
        roles = self.columns or {role: role for role in _ROLES if role in rows.column_names}
        if not self.columns and not _SAID & set(roles):
            roles |= dict([("messages", name) for name in _TURNS if name in rows.column_names][:1])
        for role, column in roles.items():
            if column not in rows.column_names:
                problem = f"the data set has no such column; there are {', '.join(rows.column_names)}"
                raise ValueError(f"`columns.{role}` {column}: {problem}")
        if not _SAID & set(roles):
            problem = (
                "must name a column for messages, for text, or for question and answer; the data set has "
                f"{', '.join(rows.column_names)}"
            )
            raise ValueError(f"`columns` {self.columns or '(not given)'}: {problem}")
        unused = _media_without_role(rows, [*roles.values()])
        if not self.columns:
            if {"text", "question"} <= set(roles) and "messages" not in roles:
                raise ValueError("`columns` (not given): both text and question are said; name the ones that count")
            _refuse_unused(unused, bool({"image", "images"} & set(roles)))
        else:
            if unused:
                log.warning("`columns` leaves out the media of %s: they have no role", ", ".join(unused))
            needed = [*roles.values(), *(name for name in rows.column_names if name == "choices")]
            rows = rows.select_columns([*dict.fromkeys(needed)])  # nothing else is decoded
        self._roles = dict(roles)
        self._rows = self._without_decoding(rows)

    def _load(self) -> Any:
        import datasets

        path = Path(self.path)
        on_disk = isfile(path / "dataset_dict.json") or isfile(path / "state.json")
        file_type = _FILE_TYPES.get(path.suffix)
        if isfile(path) and file_type is None:
            raise ValueError(f"`path` {self.path}: not one of {', '.join(_FILE_TYPES)}")
        is_local = path.is_absolute() or self.path.startswith(".") or self.path.count("/") > 1
        if is_local and not exists(path):
            raise ValueError(f"`path` {self.path}: no such file or folder")
        if exists(path) and not (isfile(path) or isdir(path)):
            raise ValueError(f"`path` {self.path}: {why_no_file(path)}")
        datasets.disable_progress_bars()
        try:
            if on_disk:
                loaded = datasets.load_from_disk(str(path))
            elif isfile(path):
                if file_type == "csv":
                    _refuse_shifted(path)
                loaded = datasets.load_dataset(file_type, data_files=str(path), split=self.split)
            else:
                loaded = datasets.load_dataset(
                    self.path, self.name, split=self.split, data_files=self.data_files, revision=self.revision
                )
        except MemoryError:
            raise
        except Exception as error:  # files of the user's, read by many libraries
            if isfile(path) and not path.stat().st_size:
                raise ValueError(f"`path` {self.path}: holds no samples") from error
            raise ValueError(f"`path` {self.path}: cannot be loaded ({_reason(error)})") from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if self.split not in loaded:
            raise ValueError(f"`split` {self.split}: the data set has no such split; there are {', '.join(loaded)}")
        return loaded[self.split]

    def _without_decoding(self, rows: Any) -> Any:
        """Images as bytes or paths, so that a broken one is an error of this sample, with its name."""
        import datasets

        for role in ("image", "images"):
            column = self._roles.get(role)
            if column is None:
                continue
            feature = rows.features[column]
            undecoded = datasets.Image(decode=False)
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, undecoded)
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                rows = rows.cast_column(column, type(feature)(undecoded))
        return rows

    def verify(self, indices: Sequence[int]) -> None:
        verify_files(self, indices, self.path)

    def __len__(self) -> int:
        self.setup()
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation | Document:
        self.setup()
        try:
            row = self._rows[index]
        except MemoryError:
            raise
        except Exception as error:  # of decoders by others, for columns within columns
            raise RunError(f"{self.path}, row {index}: cannot be read ({first_line(error)})") from error
        values = {role: self._named(column, row[column]) for role, column in self._roles.items()}
        name = str(values.get("id", f"{self.path}, row {index}"))
        try:
            if not isinstance(values.get("messages"), (list, tuple, type(None))):
                raise ValueError(
                    f"the column of messages holds {type(values['messages']).__name__}, not a list of turns"
                )
            if values.get("messages"):
                values["messages"] = plain_turns(values["messages"])
            is_named = not self.columns and self._roles.get("messages") == "messages"
            if is_named and values.get("messages") and row.get("conversations"):
                raise ValueError("both `messages` and `conversations` hold turns; say with `columns` which count")
            images = self._images(values, row, name)
            media = ("image",) if images else ()
            if values.get("messages") is not None:
                messages = messages_from_turns(values["messages"], media)
            elif "text" in values:
                if not isinstance(values["text"], str) or not values["text"].strip():
                    raise ValueError("no text")
                if not images:
                    return Document(values["text"].strip(), max_tokens=self.max_tokens, id=name)
                messages = messages_from_turns([{"role": "user", "content": values["text"]}], media)
            else:
                messages = _question_and_answer(values, row.get("choices"), media)
            task = task_name(values.get("task"))
            images = place_media(messages, images)
            refuse_unfilled(messages, self._folder, images)
            messages = with_system(messages, system_text(values if self.columns else row))
            return Conversation(messages, images, id=name, task=task)
        except ValueError as error:
            raise SampleError(str(error), str(values.get("id", ""))) from None

    def _named(self, column: str, value: Any) -> Any:
        """The name of a class where the column holds class numbers."""
        name_of = getattr(self._rows.features[column], "int2str", None)
        return name_of(value) if name_of is not None and isinstance(value, int) and value >= 0 else value

    @property
    def _folder(self) -> Path:
        return Path(self.path) if isdir(self.path) else Path(self.path).parent

    def _images(self, values: dict[str, Any], row: dict[str, Any], name: str) -> list[Image.Image | Path]:
        entries = _entries(values)
        turns = values.get("messages") or []
        within = references_of_turns(turns)
        if within["video"] or within["audio"] or (entries and within["image"]):
            raise ValueError("the turns name videos, sounds, or images beside those of a column of their own")
        found = {"image": [*map(_reference, entries or within["image"])], "video": [], "audio": []}
        refuse_overlooked_in_turns(turns, found)
        if not self.columns:
            try:
                refuse_overlooked(row, [*self._roles.values()], found)
            except ValueError as error:
                raise ValueError(f"{error}; `columns` says which columns are taken") from None
            tell_of_files(row, [*self._roles.values()], found, self._folder, self._told)
        return [_image(entry, name, self._folder) for entry in entries or within["image"]]


def _media_without_role(rows: Any, taken: Sequence[str]) -> dict[str, str]:
    """Column -> kind of the media that it holds or names, of those that nobody takes."""
    import datasets

    found = {}
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        number = isinstance(inner, datasets.ClassLabel) or getattr(inner, "dtype", "").startswith(_NUMBERS)
        kind = TENSORS.get(name) or _decoded(feature) or kind_of_key(name)
        if kind is not None and not (number and name not in TENSORS) and name not in taken:
            found[name] = kind
    return found


def _decoded(feature: Any) -> str | None:
    """The kind of media that a column's decoder gives, at whatever depth."""
    kind = getattr(feature, "_type", "").lower()
    if kind in MEDIA:
        return kind
    if isinstance(feature, dict):
        inner: list[Any] = list(feature.values())
    else:
        inner = list(feature) if isinstance(feature, (list, tuple)) else [getattr(feature, "feature", None)]
    return next((found for one in inner if one is not None and (found := _decoded(one)) is not None), None)


def _refuse_unused(unused: dict[str, str], understood: bool) -> None:
    """Raise where no image is understood, and media would be left out because nobody says what their column is for."""
    for name, kind in unused.items():
        if kind == "image" and understood:  # each row tells whether it is another one
            continue
        way_out = f"{{image: {name}, ...}}" if kind == "image" else "the columns to take; this source takes images"
        raise ValueError(f"`columns` (not given): the column {name} holds {kind}s and has no role; name {way_out}")


def _refuse_shifted(path: Path) -> None:
    """Raise where a table's first row has more fields than its header, which pandas takes for names of rows."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header, first = next(rows, []), next(rows, [])
    if len(first) > len(header):
        raise ValueError(
            f"the first row has {len(first)} fields, the header {len(header)}; quote commas inside a field"
        )


def _reason(error: BaseException) -> str:
    """What an error says; of one that only says that there was one, what caused it."""
    cause = error.__cause__
    return first_line(cause if type(error).__name__ == "DatasetGenerationError" and cause is not None else error)


def _entries(values: dict[str, Any]) -> list[Any]:
    """What the columns of images hold; of one image that both have, what `images` holds."""
    one, several = (
        [entry for entry in (value if isinstance(value, (list, tuple)) else [value]) if entry is not None]
        for value in (values.get("image"), values.get("images"))
    )
    if one and several and not all(entry in several for entry in one):
        raise ValueError("`image` and `images` hold different images; say with `columns` which count")
    return several or one


def _reference(entry: Any) -> Any:
    """What other entries of a record may call the same image."""
    return entry.get("path") or entry if isinstance(entry, dict) else entry


def _image(entry: Any, name: str, folder: Path) -> Image.Image | Path:
    if isinstance(entry, dict) and entry.get("bytes"):
        return open_image_bytes(entry["bytes"], entry.get("path") or f"an image of {name}")
    file = entry.get("path") if isinstance(entry, dict) else entry
    if not isinstance(file, (str, bytes, Image.Image)):
        raise ValueError(f"{type(entry).__name__} in the column of images")
    return opened(file, "image", folder, f"an image of {name}")


def _question_and_answer(values: dict[str, Any], choices: Any, media: Sequence[str]) -> list[Message]:
    turns = []
    for role, speaker in (("question", "user"), ("answer", "assistant")):
        text = values.get(role)
        if role == "answer" and isinstance(text, int) and choices is not None:
            choices = choices.get("text") if isinstance(choices, dict) else choices  # as ARC has them
            if not isinstance(choices, (list, tuple)):
                raise ValueError(f"the answer {text} is a number, and the choices are no list")
            if not 0 <= text < len(choices):
                raise ValueError(f"the answer {text} is none of {len(choices)} choices")
            text = choices[text]
            if text is None:
                raise ValueError("the choice that is the answer is null")
        # Sets with several reference answers give a list.
        text = text[0] if isinstance(text, (list, tuple)) and text else text
        if isinstance(text, dict) and isinstance(text.get("answer"), str):  # as VQAv2 has them
            text = text["answer"]
        if text is None:
            continue
        if isinstance(text, bool) or not isinstance(text, (str, int, float)) or text != text:
            raise ValueError(f"the column of the {role} holds {type(text).__name__}, not text")
        turns.append({"role": speaker, "content": str(text)})
    messages = messages_from_turns(turns, media)
    if messages[0]["role"] == "assistant":
        messages.insert(0, {"role": "user", "content": []})
    return messages
