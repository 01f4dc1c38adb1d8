"""A hook of mkdocs: lines end behind the dots of an option's name, and not between its hyphens; nor beside `±`."""

import re
from typing import Any

_INLINE = re.compile(r"<code>[^<]+</code>")
_COMMANDS = re.compile(r'<div class="language-bash .*?</pre>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Keep the parts of each option whole.

    Args:
        html: Content of a page.

    Example:
        >>> on_page_content("<p><code>prune --data.seed 1</code></p>")
        '<p><code>prune <span class="whole">--data.</span><wbr><span class="whole">seed</span> 1</code></p>'
    """
    for place in (_INLINE, _COMMANDS):
        html = place.sub(lambda found: _with_whole_options(found[0]), html)
    return html.replace(" ± ", "&nbsp;±&nbsp;")


def _with_whole_options(html: str) -> str:
    """Between tags only, where no attribute is."""
    return re.sub(r">[^<]+<", lambda text: re.sub(r"(?<![\w-])--[\w.]+", _whole_parts, text[0]), html)


def _whole_parts(option: re.Match[str]) -> str:
    return "<wbr>".join(f'<span class="whole">{part}</span>' for part in re.findall(r"[^.]+\.*", option[0]))
