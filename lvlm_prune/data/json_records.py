"""Random access to the records of a large JSON or JSONL file.

    [{"id": 0, ...}, {"id": 1, ...}, ...]        one array, on one line or many
    {"id": 0, ...}\n{"id": 1, ...}\n ...         JSONL: one object per line

Only the byte range of each record is kept, 16 bytes per record; a record is parsed when it is asked for.
"""

from __future__ import annotations

import json
import re
from array import array
from os.path import isfile
from pathlib import Path
from typing import Any, BinaryIO

from lvlm_prune.errors import why_no_file

_CHUNK = 1 << 20
_OUTSIDE_STRINGS = re.compile(rb'["{}\[\]]')
# Possessive: without backtracking a long string costs no memory.
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
# Two of them are one character.
_HALF_CHARACTER = re.compile(rb"\\ud[89a-f]", re.IGNORECASE)


class JsonRecords:
    """The objects in a JSON array or a JSONL file, by number. The form is told from the content, not from the name.

    Args:
        path: The file.

    Raises:
        ValueError: No such file, neither of the two forms, an array of anything but objects, cut off in its middle, or
            followed by something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not isfile(self.path):
            raise ValueError(f"`path` {path}: {why_no_file(self.path)}")
        self._starts = array("Q")
        self._ends = array("Q")
        try:
            self._index()
        except OSError as error:
            raise ValueError(f"`path` {path}: cannot be read ({error.strerror})") from None
        if not self._starts:
            raise ValueError(f"`path` {path}: holds no samples")

    def _index(self) -> None:
        with self.path.open("rb") as file:
            head = file.read(_CHUNK)
            offset = 3 if head.startswith(b"\xef\xbb\xbf") else 0
            first = head[offset:].lstrip()[:1]
            file.seek(offset)
            if first == b"[":
                self._index_array(file)
            elif first == b"{":
                self._index_lines(file)
            elif head.strip() or first:
                raise ValueError(f"`path` {self.path}: neither a JSON array of samples nor one JSON object per line")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record number `index`.

        Raises:
            ValueError: It is not valid JSON, not an object, or holds half a character (`"\\ud83d"`), which JSON allows
                and neither a tokenizer nor a file takes.
        """
        start, end = self._starts[index], self._ends[index]
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            record = json.loads(content)
            if _HALF_CHARACTER.search(content):
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"invalid JSON at byte {start} of {self.path} ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{type(record).__name__} at byte {start} of {self.path}, expected an object")
        return record

    def _index_lines(self, file: BinaryIO) -> None:
        position = file.tell()
        for line in file:
            if not line.isspace():
                self._starts.append(position)
                self._ends.append(position + len(line))
            position += len(line)

    def _refuse_more(self, file: BinaryIO) -> None:
        """Raise where something follows the array: its samples would be left out in silence."""
        position = file.tell()
        while chunk := file.read(_CHUNK):
            if rest := chunk.lstrip():
                where = position + len(chunk) - len(rest)
                raise ValueError(f"`path` {self.path}: goes on at byte {where}, behind its JSON array")
            position += len(chunk)

    def _index_array(self, file: BinaryIO) -> None:
        """Follow nesting depth and strings, without building a single object.

        The state fits in four variables, so memory does not grow with the file, nor with its longest record.
        """
        depth = 0
        in_string = False
        base = file.tell()
        position = 0
        while chunk := file.read(_CHUNK):
            while position < len(chunk):
                if in_string:
                    position = _REST_OF_STRING.match(chunk, position).end()  # type: ignore[union-attr]
                    if position < len(chunk):
                        # Either the closing quote, or a backslash whose partner begins the next chunk.
                        in_string = chunk[position] != ord('"')
                        position += 1 + in_string
                    continue
                match = _OUTSIDE_STRINGS.search(chunk, position)
                if depth == 1:  # between two records, up to the bracket of the next one or of the array
                    until = len(chunk) if match is None else match.end()
                    rest = chunk[position:until].lstrip(b" \t\r\n,")
                    if rest not in (b"", b"{", b"[", b"]", b"}"):
                        where = base + until - len(rest)
                        raise ValueError(f"`path` {self.path}: what its array has at byte {where} is no object")
                if match is None:
                    break
                character, position = match[0], match.end()
                if character == b'"':
                    in_string = True
                elif character in b"{[":
                    if depth == 1:
                        self._starts.append(base + match.start())
                    depth += 1
                else:
                    depth -= 1
                    if depth == 1:
                        self._ends.append(base + match.end())
                    elif depth == 0:
                        file.seek(base + position)
                        self._refuse_more(file)
                        return
            base += len(chunk)
            position = max(0, position - len(chunk)) if in_string else 0
        problem = f"ends in the middle of its JSON array, after {len(self._ends)} complete samples (truncated?)"
        raise ValueError(f"`path` {self.path}: {problem}")
