"""Labels: which tokens of a conversation are the answers that a model is to learn.

    input_ids   <s> <user> <image> ... What color? <assistant>  red   </s>
    labels      -100 ...................................... -100  red   </s>

A template may end before the answer with a space that the tokenizer joins with the first word of it, as byte-level BPE
does (`" red"`): that token is the answer's.

As in transformers, labels stand beside the tokens that they name (the model shifts them), and -100 counts nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvlm_prune.data.batches import Inputs
from lvlm_prune.data.conversation import Conversation, Document
from lvlm_prune.data.processing import encode, render, tokenizer_of

IGNORED = -100


class AnswersNotLocated(ValueError):
    """Which tokens are the answer cannot be told; what the model generates can still be compared with it."""


def encode_with_labels(processor: Any, sample: Conversation | Document) -> Inputs:
    """Model inputs of a sample with `labels`, int64 of the shape of `input_ids`.

    Every turn of the assistant is to be learnt, its end token included; of a document, every token.

    Raises:
        RunError: An image is missing or broken.
        AnswersNotLocated: The answers cannot be located among the tokens.
        ValueError: The processor refuses the sample.
    """
    inputs = encode(processor, sample)
    if isinstance(sample, Document):
        return inputs | {"labels": inputs["input_ids"].clone()}
    return inputs | {"labels": _label_answers(processor, sample, inputs["input_ids"])}


def label_last_answer(processor: Any, sample: Conversation, input_ids: Tensor) -> Tensor:
    """Labels of the last turn of the assistant, its end token included, and of no earlier one.

    Args:
        processor: Of the model.
        sample: The conversation.
        input_ids: Its tokens, shape (1, T).

    Returns:
        int64 of shape (1, T), `IGNORED` where no answer is.

    Raises:
        AnswersNotLocated: The answers cannot be located among the tokens.
    """
    return only_last(_label_answers(processor, sample, input_ids))


def only_last(labels: Tensor) -> Tensor:
    """Labels (1, T) of all answers without those before the last one.

    Example:
        >>> only_last(torch.tensor([[-100, 5, 6, -100, 7, 2]])).tolist()
        [[-100, -100, -100, -100, 7, 2]]
    """
    ignored = labels[0] == IGNORED
    starts = (ignored[:-1] & ~ignored[1:]).nonzero()
    if len(starts):
        labels[0, : starts[-1] + 1] = IGNORED
    return labels


def _label_answers(processor: Any, sample: Conversation, input_ids: Tensor) -> Tensor:
    if sample.messages[0]["role"] == "assistant":
        raise AnswersNotLocated("the conversation begins with an answer: there is no question before it")
    labels = torch.full_like(input_ids, IGNORED)
    whole = render(processor, sample.messages)
    ids = input_ids[0].tolist()
    for number, message in enumerate(sample.messages):
        if message["role"] == "assistant":
            start = _tokens_before(processor, sample, ids, whole, number, is_start=True)
            end = _tokens_before(processor, sample, ids, whole, number + 1, is_start=False)
            labels[:, start:end] = input_ids[:, start:end]
    return labels


def joins_answer(processor: Any, asked: Conversation, answered: Conversation) -> bool:
    """Whether the tokens of a question, up to where a model begins to answer, are others when the answer follows.

    A model generates behind the former and was trained on the latter, so that it may answer worse than it could. The
    text tells it; images are not read.

    Args:
        processor: Of the model.
        asked: The turns up to the answer.
        answered: The same with the answer.
    """
    tokens = tokenizer_of(processor)
    before = render(processor, asked.messages, add_generation_prompt=True)
    whole = render(processor, answered.messages)
    if not whole.startswith(before):
        return False
    head, ids = (list(tokens(text, add_special_tokens=False)["input_ids"]) for text in (before, whole))
    return head != ids[: len(head)]


def _tokens_before(processor: Any, sample: Conversation, ids: list[int], whole: str, turns: int, is_start: bool) -> int:
    """Number of tokens of the first `turns` turns, at whose end an answer starts, or ends.

    Counted from the end where the text that follows tokenizes alone as it does in its place; else by the places of the
    tokens in the text; both spare processing the images once more, which counting from the beginning does not.
    """
    beginning = sample.messages[:turns]
    text = render(processor, beginning, add_generation_prompt=is_start)
    if not whole.startswith(text):
        raise AnswersNotLocated("the chat template renders the beginning of a conversation otherwise than the whole")
    rest = whole[len(text) :]
    tail = tokenizer_of(processor)(rest, add_special_tokens=False)["input_ids"] if rest else []
    if list(tail) == ids[len(ids) - len(tail) :]:
        return len(ids) - len(tail)
    if (found := _by_places(processor, ids, whole, len(text), is_start)) is not None:
        return found
    head = encode(processor, sample.beginning(turns), is_start)["input_ids"][0]
    if head.tolist() != ids[: len(head)]:
        raise AnswersNotLocated("the answers cannot be located among the tokens (they share one with what is around)")
    return len(head)


def _by_places(processor: Any, ids: list[int], whole: str, place: int, is_start: bool) -> int | None:
    """Number of tokens before a place of the text, one across it being the answer's; None where that cannot be told.

    The tokens of the text differ from those of the sample where the processor made many of one placeholder.
    """
    try:
        encoded = tokenizer_of(processor)(whole, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:  # a tokenizer in Python keeps no places
        return None
    plain, spans = list(encoded["input_ids"]), encoded["offset_mapping"]
    behind = (number for number, (start, end) in enumerate(spans) if (end if is_start else start + 1) > place)
    count = next(behind, len(plain))
    after = len(plain) - count
    if plain[count:] == ids[len(ids) - after :]:
        return len(ids) - after
    return count if plain[:count] == ids[:count] else None
