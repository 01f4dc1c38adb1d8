"""Chat templates that do not come to an end or say nothing of what is said: programs by whoever made the model."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor

from lvlm_prune.errors import InputError, RunError

_SECONDS = 10.0  # of this process; a conversation takes milliseconds
_WORD = re.compile(r"\w+")
_LONGEST = 2**26  # characters; no context holds so many
_MANY_WORDS = 8
# What was thought ends so: `</think>`, `</reasoning>`, `◁/think▷`.
_THOUGHT = re.compile(r".*[<◁]/\w*(think|thought|reason)\w*[>▷]", re.DOTALL)
_MOST_BITS = 2**17  # of a whole number; products of larger ones take milliseconds and more


@contextmanager
def coming_to_an_end(name: str) -> Iterator[None]:
    """Within, a chat template that loops on and on is ended, and so is one that calculates with immense numbers.

    Seconds of this process are counted, not those of the clock, and only on its main thread: samples are read there.
    Nothing interrupts a single step, so that no step may be long.

    Args:
        name: Whose template it is.

    Raises:
        InputError: It took too long, or would.
    """
    with _short_steps(name), _timed(name):
        yield


@contextmanager
def _short_steps(name: str) -> Iterator[None]:
    """Within, templates are compiled so that they ask before they add, multiply or raise to a power."""
    from jinja2.sandbox import SandboxedEnvironment

    def calculate(environment: SandboxedEnvironment, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _size_of_result(operator, left, right) > _MOST_BITS:
            raise InputError("", name, "its chat template calculates with immense numbers, which may take for ever")
        return environment.binop_table[operator](left, right)

    sandbox: Any = SandboxedEnvironment  # transformers' own, which keeps what it has compiled
    kept = sandbox.intercepted_binops, sandbox.call_binop
    sandbox.intercepted_binops, sandbox.call_binop = frozenset(("+", "*", "**")), calculate
    try:
        yield
    finally:
        sandbox.intercepted_binops, sandbox.call_binop = kept


def _size_of_result(operator: str, left: Any, right: Any) -> float:
    """Bits of the whole number that an operation makes, at most, or entries of the text or list over a thousand.

    Example:
        >>> [_size_of_result(*of) for of in (("**", 10, 10**9), ("*", 2**70, 2**70), ("*", "ab", 10**6), ("+", 1.5, 2))]
        [4000000000, 142, 2000.0, 0.0]
    """
    numbers = [one for one in (left, right) if isinstance(one, int)]
    lengths = [len(one) for one in (left, right) if isinstance(one, (str, list, tuple))]
    if len(numbers) == 2 and operator == "**":
        return abs(left).bit_length() * abs(right)
    if len(numbers) == 2:
        return sum(abs(number).bit_length() for number in numbers)
    if operator == "*" and numbers and lengths:
        return lengths[0] * abs(numbers[0]) / 1000
    return sum(lengths) / 1000


@contextmanager
def _timed(name: str) -> Iterator[None]:
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
    """Refuse a conversation of which a template made more than any context holds, or little of what one side says.

    Args:
        text: The conversation as the template writes it.
        said: Role -> the texts of its turns. What the system says may be left out, as some templates do.

    Raises:
        RunError: It did. Tokenizers take a hundredfold of a text's memory; role words alone calibrate for nothing.
            Words are compared, not letters: templates strip, indent, and may write all in capitals.

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
        # Of earlier turns templates may leave out some; of the last one no more than what was only thought.
        last = _WORD.findall(_THOUGHT.sub("", "".join(said.get(role, ())[-1:]).casefold()))
        last = [word for word in last if len(word) > 2]
        kept = len(last) if len(last) < _MANY_WORDS else sum(map(set(_WORD.findall(written)).__contains__, last))
        if kept < len(last) / 2:
            raise RunError(f"its chat template keeps {kept} of the {len(last)} words that the {role} says last")


def refuse_unread(tokenizer: Any, input_ids: Tensor, said: Sequence[str]) -> None:
    """Refuse a sample of whose text a tokenizer made nothing but unknown and special tokens.

    Raises:
        RunError: It did.
    """
    if any(map(_WORD.search, said)) and {*input_ids.flatten().tolist()} <= {*tokenizer.all_special_ids}:
        raise RunError("its tokenizer knows no part of its text")
