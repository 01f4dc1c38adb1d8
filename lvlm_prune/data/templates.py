"""Chat templates that do not come to an end or say nothing of what is said: programs by whoever made the model."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn

from torch import Tensor

from lvlm_prune.errors import InputError, RunError

_SECONDS = 10.0  # of this process; a conversation takes milliseconds
_WORD = re.compile(r"\w+")
_LONGEST = 2**26  # characters; no context holds so many


def calculates_powers(template: Any) -> bool:
    """Whether a chat template has the operator `**`: one such step may take for ever, and nothing can interrupt it.

    Args:
        template: Of a tokenizer or a processor: a text, several by name, or None.

    Example:
        >>> calculates_powers("{{ 10**(10**9) }}"), calculates_powers("{{ '**' }} {{ f(a, **b) }} **bold** {# 2**3 #}")
        (True, False)
    """
    from jinja2 import Environment, TemplateSyntaxError

    texts = template.values() if isinstance(template, dict) else [template]
    try:
        return any(_has_power(Environment().lex(text)) for text in texts if isinstance(text, str))
    except TemplateSyntaxError:  # said of the first sample
        return False


def _has_power(tokens: Iterable[tuple[int, str, str]]) -> bool:
    """Whether `**` stands between two values, and not before the arguments of a call."""
    values = [value for _, kind, value in tokens if kind != "whitespace"]
    return any(value == "**" and before not in ("(", ",") for before, value in pairwise(values))


@contextmanager
def coming_to_an_end(name: str) -> Iterator[None]:
    """Within, a chat template that loops on and on is ended.

    Seconds of this process are counted, not those of the clock, and only on its main thread: samples are read there.

    Args:
        name: Whose template it is.

    Raises:
        InputError: It took too long.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "ITIMER_VIRTUAL") or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return

    def end(*_: Any) -> NoReturn:
        raise InputError(
            "", name, f"its chat template does not come to an end ({_SECONDS:g} seconds, one conversation)"
        )

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS, 1.0)  # again, where the first is lost in a library
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def refuse_unusable(text: str, said: Mapping[str, Sequence[str]]) -> None:
    """Refuse a conversation of which a template made more than any context holds, or nothing of what one side says.

    Args:
        text: The conversation as the template writes it.
        said: Role -> the texts of its turns. What the system says may be left out, as some templates do.

    Raises:
        RunError: It did. Tokenizers take a hundredfold of a text's memory; role words alone calibrate for nothing.

    Example:
        >>> refuse_unusable("USER: IS THIS A CAT?", {"user": ["is this a cat?"]})
        >>> refuse_unusable("USER: ASSISTANT: yes", {"user": ["is this a cat?"], "assistant": ["yes"]})
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.RunError: its chat template leaves out all that the user says
    """
    if len(text) > _LONGEST:
        raise RunError(f"its chat template makes {len(text)} characters of it")
    written = text.casefold()
    for role in ("user", "assistant"):
        words = [word for one in said.get(role, ()) for word in _WORD.findall(one.casefold())]
        words = [word for word in words if len(word) > 2] or words  # short ones stand in role words too
        if words and not any(word in written for word in words):
            raise RunError(f"its chat template leaves out all that the {role} says")


def refuse_unread(tokenizer: Any, input_ids: Tensor, said: Sequence[str]) -> None:
    """Refuse a sample of whose text a tokenizer made nothing but unknown and special tokens.

    Raises:
        RunError: It did.
    """
    if any(map(_WORD.search, said)) and {*input_ids.flatten().tolist()} <= {*tokenizer.all_special_ids}:
        raise RunError("its tokenizer knows no part of its text")
