"""Labels: which tokens of a conversation are the answers that a model is to learn.

    input_ids   <s> <user> <image> ... What color? <assistant>  red   </s>
    labels      -100 ...................................... -100  red   </s>

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


def encode_with_labels(processor: Any, sample: Conversation | Document) -> Inputs:
    """Model inputs of a sample with `labels`, int64 of the shape of `input_ids`.

    Every turn of the assistant is to be learnt, its end token included; of a document, every token.

    Raises:
        RunError: An image is missing or broken.
        ValueError: The processor refuses the sample, or its answers cannot be located among the tokens.
    """
    inputs = encode(processor, sample)
    if isinstance(sample, Document):
        return inputs | {"labels": inputs["input_ids"].clone()}
    return inputs | {"labels": _label_answers(processor, sample, inputs["input_ids"])}


def _label_answers(processor: Any, sample: Conversation, input_ids: Tensor) -> Tensor:
    labels = torch.full_like(input_ids, IGNORED)
    whole = render(processor, sample.messages)
    ids = input_ids[0].tolist()
    for number, message in enumerate(sample.messages):
        if message["role"] == "assistant":
            start = _tokens_before(processor, sample, ids, whole, number, add_generation_prompt=True)
            end = _tokens_before(processor, sample, ids, whole, number + 1, add_generation_prompt=False)
            labels[:, start:end] = input_ids[:, start:end]
    return labels


def _tokens_before(
    processor: Any, sample: Conversation, ids: list[int], whole: str, turns: int, add_generation_prompt: bool
) -> int:
    """Number of tokens of the first `turns` turns.

    Counted from the end where the text that follows tokenizes alone as it does in its place, which spares processing
    the images once more; else from the beginning.
    """
    beginning = sample.messages[:turns]
    text = render(processor, beginning, add_generation_prompt)
    if not whole.startswith(text):
        raise ValueError("the chat template renders the beginning of a conversation otherwise than the whole")
    rest = whole[len(text) :]
    tail = tokenizer_of(processor)(rest, add_special_tokens=False)["input_ids"] if rest else []
    if list(tail) == ids[len(ids) - len(tail) :]:
        return len(ids) - len(tail)
    head = encode(processor, sample.beginning(turns), add_generation_prompt)["input_ids"][0]
    if head.tolist() != ids[: len(head)]:
        raise ValueError("the answers cannot be located among the tokens")
    return len(head)
