r"""What stands in a text for an image, a video or a sound, and where it does so.

<image>                                    of that name: understood in every record that has images
<image 1>  <image_2>  <|image_3|>          numbered, as MMMU, MiniCPM-V and Phi have them: so are these
[IMG]  <|image_pad|>  <im_patch>           tokens of one family of models: not understood
<img src="a.png">  ![](a.png)  a.png       a file

Texts speak of all of them: `docker run <image>`. They stand for something where data sets put them, first or last in
what the user says, or on a line of their own; a file where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_KINDS = {"image": "image", "img": "image", "video": "video", "audio": "audio", "speech": "audio"}
_WORDS = "pad|patch|token|soft|placeholder|context|here|start|end|features?|embeds?|unk"
_SPELLINGS = re.compile(
    rf"(?<![`'\"])(?:(?i:<\|?(?:(?:start|begin)_of_)?({'|'.join(_KINDS)})(?:[ _-]?(?:(\d{{1,9}})|{_WORDS})){{0,3}}\|?>)"
    r"|<im_(?:patch|start)>|<\|vision_(?:start|pad)\|>|\[IMG\](?!.{0,999}\[/IMG\]))(?![`'\"])"
)
_BLANKS, _REST = re.compile(r"[ \t]*"), re.compile(r"\s*\Z")
_SPEAKS = re.compile(r"\s+(tag|element|attribute|placeholder|token|node)s?\b", re.IGNORECASE)

_NAME = r"(?:\"([^\"<>\n]{1,9999})\"|'([^'<>\n]{1,9999})'|([^\s<>\"']{1,9999}))"
_FILES = re.compile(
    rf"<(?:img|image|video|audio|source)\b[^<>]{{0,999}}?\ssrc\s{{0,9}}=\s{{0,9}}{_NAME}"
    r"|!\[[^\[\]\n]{0,999}\]\([ \t]{0,9}<?([^\s()<>]{1,9999})|^[ \t]{0,9}(\S{1,255})[ \t]{0,9}$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Placeholder:
    """One in a text.

    Args:
        kind: `image`, `video` or `audio`.
        number: Which of them it says that it stands for; None where it does not say.
        start: Where it begins.
        end: Where it ends.
    """

    kind: str
    number: int | None
    start: int
    end: int

    def stands_for_something(self, text: str) -> bool:
        """Whether it is where data sets put them: first or last in the text, or on a line of its own."""
        start = self.start  # nothing is copied: a text may hold very many
        while start and text[start - 1] in " \t":
            start -= 1
        before = text[start - 1 : start]
        behind = _BLANKS.match(text, self.end)
        after = text[behind.end() : behind.end() + 1] if behind else ""
        alone = before in ("", "\n") and after in ("", "\n")
        while start and text[start - 1].isspace():
            start -= 1
        last = _REST.match(text, self.end) is not None and text[start - 1 : start] in (".", "?", "!", ":")
        first = not start and not _SPEAKS.match(text, self.end)
        return alone or last or first


def placeholders_in(text: str) -> Iterator[Placeholder]:
    """Those of a text, however they are spelled, in order.

    Example:
        >>> [(one.kind, one.number) for one in placeholders_in("<|image_2|> <video> [IMG] <|im_start|> `<image>`")]
        [('image', 2), ('video', None), ('image', None)]
    """
    for found in _SPELLINGS.finditer(text):
        kind = _KINDS[found[1].lower()] if found[1] else "image"
        yield Placeholder(kind, int(found[2]) if found[2] else None, *found.span())


def names_in(text: str) -> Iterator[str]:
    """Whatever is written in a text as if it were the name of a file to be shown there, in order.

    Example:
        >>> [*names_in('![a cat](a.png "A") <img alt="" src="b.png"/>')]
        ['a.png', 'b.png']
    """
    for found in _FILES.finditer(text):
        yield next(name for name in found.groups() if name)
