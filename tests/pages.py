"""Reading a page as a test needs it."""

import re
from html.parser import HTMLParser

import pytest


class Page(HTMLParser):
    """Numbers that a page shows with where they come from, and the text around them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[tuple[str, float, str, str]] = []  # path in the record, exact value, unit, text shown
        self.text = ""
        self.figures: list[str] = []
        self.tables: dict[str, int] = {}
        self._inside: list[str] = []
        self._number: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ("svg", "style", "code", "pre", "data", "title", "h1", "th", "td", "dd"):
            self._inside.append(tag)
        found = dict(attributes)
        if tag == "data":
            self._number = found
        if tag == "figure":
            self.figures.append(found["id"])

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if "data" in self._inside:
            number = self._number
            self.numbers.append((number["data-path"], float(number["value"]), number["data-unit"], data))
        elif not self._inside:
            self.text += data


def value_at(record, path: str):
    """What stands at a path of a record, keys of mappings as text."""
    for part in path.split("/"):
        if isinstance(record, list):
            record = record[int(part)]
        else:
            record = next(value for key, value in record.items() if str(key) == part)
    return record


def refuse_other_numbers(page: Page, record: dict) -> None:
    """Fail where a page shows a number that is not the record's, or does not say where it comes from."""
    for path, value, unit, text in page.numbers:
        exact = value_at(record, path)
        assert value == exact, path
        shown = float(re.sub(r"[^0-9.e+-]", "", text))
        sizes = {"kB": 1e-3, "MB": 1e-6, "GB": 1e-9}
        scale = sizes[text[-2:]] if unit == "bytes" else {"percent": 100, "sparsity": 100}.get(unit, 1)
        assert shown == pytest.approx(exact * scale, rel=6e-3, abs=6e-5 if unit == "share" else 0.051), path
    assert not re.search(r"\d", page.text), re.findall(r".{0,20}\d.{0,20}", page.text)
