"""English prose that Python itself ships: the language reference behind `help()`, as paragraphs."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics

_SHORTEST = 200
_LETTERS = 0.93


def paragraphs() -> list[str]:
    """Paragraphs of prose, each once, in an order that is always the same and mixes the topics.

    Tables and code are left out.
    """
    text = "\n\n".join(text for _, text in sorted(topics.items()))
    found = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in text.split("\n\n")]
    # Topics share paragraphs; what calibrates must not be held out as well.
    prose = [
        paragraph
        for paragraph in dict.fromkeys(found)
        if len(paragraph) > _SHORTEST and _share_of_letters(paragraph) > _LETTERS
    ]
    random.Random(0).shuffle(prose)
    return prose


def _share_of_letters(text: str) -> float:
    return sum(letter.isalpha() or letter == " " for letter in text) / len(text)
