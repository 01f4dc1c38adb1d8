"""Turns of a conversation in the one form that the rest reads, whatever form a data set has them in.

{"role": "user", "content": "What is it?"}                              kept
{"from": "human", "value": "What is it?"}                               kept
{"user": "What is it?", "assistant": "A cat.", "source": "ai2d"}        two turns
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks, under whatever name data sets have it -> what chat templates call it."""

_SPEAKERS = ("system", "user", "assistant")
_SAID_BY_OTHERS = ("tool", "tools", "tool_calls", "function", "function_call", "observation", "developer")
# Kana, Chinese characters, Hangul, Thai; a name has fewer of them.
_WITHOUT_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]{6}")


def plain_turns(turns: Sequence[Any]) -> list[Any]:
    """Turns with one speaker each; what is no turn stays as it is.

    Args:
        turns: As data sets write them.

    Raises:
        ValueError: A turn has two different speakers or texts, or something that is said by others.

    Example:
        >>> plain_turns([{"user": "Hi?", "assistant": "Yes.", "source": "a"}])
        [{'source': 'a', 'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Yes.'}]
    """
    plain: list[Any] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            plain.append(turn)
            continue
        are_two = speaker_of(turn) is None and text_of(turn) is None
        # Beside a text, one word under such a key describes the turn.
        for name in _SAID_BY_OTHERS:
            if any(are_two or not isinstance(one, str) for one in _given(turn, name)):
                problem = f"turn {number} has `{name}`, which is not understood"
                raise ValueError(f"{problem}: there are user, assistant and system")
        if {"user", "assistant"} <= turn.keys() and are_two:
            said = [{"role": role, "content": turn[role]} for role in _SPEAKERS if turn.get(role)]
            beside = {key: value for key, value in turn.items() if key not in _SPEAKERS}
            plain += [{**beside, **said[0]}, *said[1:]] if said else [turn]
        else:
            speakers = {ROLES[name] for name in _given(turn, "role", "from") if isinstance(name, str) and name in ROLES}
            if len(speakers) > 1:
                raise ValueError(f"turn {number} is the {turn['role']}'s by `role`, and the {turn['from']}'s by `from`")
            if any(text != text_of(turn) for text in _given(turn, "content", "value")):
                raise ValueError(f"turn {number} holds different things under `content` and `value`")
            plain.append(turn)
    return plain


def system_text(record: Mapping[str, Any]) -> str:
    """What a record says to the system beside its turns; empty where it says nothing, or only names one.

    Example:
        >>> [system_text({"system": text}) for text in ("You are an expert.", "android", "Ubuntu 22.04 LTS")]
        ['You are an expert.', '', '']
    """
    prompt = record.get("system_prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    text = record.get("system")
    return text if isinstance(text, str) and _is_said(text.strip()) else ""


def _is_said(text: str) -> bool:
    """Whether this is said to a system, and does not name one (`Windows 11`): words, or a script without spaces."""
    words = [word for word in text.split() if word.strip(".,;:!?").isalpha()]
    return bool(_WITHOUT_SPACES.search(text)) or (len(text.split()) > 1 and any(word.islower() for word in words))


def with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Messages that begin with what is said to the system; the same ones where nothing is, or a turn says it.

    Args:
        messages: The messages, with parts for their content.
        text: What is said beside them; empty where nothing is.

    Raises:
        ValueError: A turn says something else to the system.
    """
    said = ["".join(part.get("text", "") for part in one["content"]) for one in messages if one["role"] == "system"]
    if not text or text in said:
        return messages
    if said:
        raise ValueError("`system` and a turn of the system say different things")
    return [{"role": "system", "content": [{"type": "text", "text": text}]}, *messages]


def speaker_of(turn: Mapping[str, Any]) -> Any:
    """Whose turn it is, in the data set's words; None where it does not say."""
    return next(iter(_given(turn, "role", "from")), None)


def text_of(turn: Mapping[str, Any]) -> Any:
    """What is said in a turn, text or parts; None where nothing is."""
    return next(iter(_given(turn, "content", "value")), turn.get("content", turn.get("value")))


def _given(turn: Mapping[str, Any], *names: str) -> list[Any]:
    """What stands under these keys; columnar files fill those that a turn does not have with nothing."""
    return [turn[name] for name in names if turn.get(name)]
