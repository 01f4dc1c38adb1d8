"""A corpus of plain text."""

from __future__ import annotations

from array import array
from os.path import isdir, isfile
from pathlib import Path

from lvlm_prune.data.conversation import Document
from lvlm_prune.data.json_records import JsonRecords
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.errors import RunError, why_no_file


class TextSource(CalibrationSource):
    """Documents of a plain-text corpus, one sample each. They do not go through the chat template.

    Args:
        path: A `.txt` file (UTF-8, documents separated by blank lines), a folder of `.txt` files (one document each,
            subfolders included, in the order of their names), or a `.json`/`.jsonl` file of objects with `column`.
        max_tokens: Longer documents are cut off after that many tokens.
        column: Key of the text in a `.json`/`.jsonl` file.
    """

    def __init__(self, path: str, max_tokens: int = 2048, column: str = "text") -> None:
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` {max_tokens}: must be at least 1")
        self.path = path
        self.max_tokens = max_tokens
        self.column = column
        self._files: list[Path] = []
        self._records: JsonRecords | None = None
        self._starts, self._ends = array("Q"), array("Q")

    def setup(self) -> None:
        if len(self._files) or self._records is not None or len(self._starts):
            return
        path = Path(self.path)
        if isdir(path):
            self._files = sorted(file for file in path.rglob("*.txt") if file.is_file())
            if not self._files:
                raise ValueError(f"`path` {self.path}: a folder without .txt files")
        elif path.suffix in (".json", ".jsonl"):
            self._records = JsonRecords(path)
            try:
                first = self._records[0]
            except ValueError as error:
                raise ValueError(f"`path` {self.path}: {error}") from None
            if self.column not in first:
                problem = f"samples have no such key; there are {', '.join(first)}"
                raise ValueError(f"`column` {self.column}: {problem}")
        elif isfile(path):
            try:
                self._index_paragraphs(path)
            except OSError as error:
                raise ValueError(f"`path` {self.path}: cannot be read ({error.strerror})") from None
            if not self._starts:
                raise ValueError(f"`path` {self.path}: holds no text")
        else:
            raise ValueError(f"`path` {self.path}: {why_no_file(path)}")

    def _index_paragraphs(self, path: Path) -> None:
        position = 0
        inside = False
        with path.open("rb") as file:
            for line in file:
                if line.isspace():
                    inside = False
                elif not inside:
                    self._starts.append(position)
                    self._ends.append(position + len(line))
                    inside = True
                else:
                    self._ends[-1] = position + len(line)
                position += len(line)

    def __len__(self) -> int:
        self.setup()
        return len(self._files) or len(self._starts) or len(self._records or ())

    def __getitem__(self, index: int) -> Document:
        self.setup()
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{self.path}, document {index}"
        try:
            if self._records is not None:
                text = self._records[index].get(self.column)
                if not isinstance(text, str):
                    raise ValueError(f"no text under {self.column!r}")
            elif self._files:
                name = str(self._files[index])
                text = self._files[index].read_text(encoding="utf-8-sig")
            else:
                with open(self.path, "rb") as file:
                    file.seek(self._starts[index])
                    text = file.read(self._ends[index] - self._starts[index]).decode("utf-8-sig")
        except (ValueError, OSError) as error:
            raise RunError(f"{name}: {error}") from None
        if not text.strip():
            raise RunError(f"{name}: is empty")
        return Document(text.strip(), max_tokens=self.max_tokens, id=name)
