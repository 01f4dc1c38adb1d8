"""Answer tokens are found among the tokens of a conversation, whatever comes before them."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lvlm_prune.data import Conversation, Document
from lvlm_prune.data.labels import IGNORED, AnswersNotLocated, encode_with_labels, joins_answer
from lvlm_prune.demo.datasets import QuestionConversations
from lvlm_prune.demo.processing import build_processor, build_tokenizer
from lvlm_prune.evaluation.builtin import _joined
from lvlm_prune.evaluation.record import evaluation_table
from lvlm_prune.evaluation.scores import Question
from lvlm_prune.report.evaluation import evaluated_notes


@pytest.fixture(scope="module")
def processor():
    return build_processor(build_tokenizer())


def turn(role, text, image=False):
    parts = [{"type": "text", "text": text}]
    return {"role": role, "content": [{"type": "image"}, *parts] if image else parts}


def learnt(processor, inputs):
    labels = inputs["labels"][0]
    assert inputs["labels"].shape == inputs["input_ids"].shape
    assert torch.equal(labels[labels != IGNORED], inputs["input_ids"][0][labels != IGNORED])
    return processor.tokenizer.decode(labels[labels != IGNORED])


def test_the_answer_and_its_end_token(processor):
    for item in QuestionConversations("train", length=6)[:]:
        answer = item["messages"][1]["content"][0]["text"]
        inputs = encode_with_labels(processor, Conversation(item["messages"], item["images"]))
        assert learnt(processor, inputs).replace(" </s>", "</s>") == f" {answer}</s>"


def test_every_turn_of_the_assistant_and_no_turn_of_the_user(processor):
    messages = [turn("user", "What color is the star?", image=True), turn("assistant", "red")]
    messages += [turn("user", "Is there a circle?"), turn("assistant", "no")]
    inputs = encode_with_labels(processor, Conversation(messages, [Image.new("RGB", (144, 144))]))
    assert learnt(processor, inputs).split() == ["red</s>", "no</s>"]


def test_an_image_between_two_answers(processor):
    """What follows the first answer holds an image, so that it tokenizes otherwise alone."""
    messages = [turn("user", "What is 3 + 4?"), turn("assistant", "7")]
    messages += [turn("user", "How many objects are there?", image=True), turn("assistant", "two")]
    inputs = encode_with_labels(processor, Conversation(messages, [Image.new("RGB", (144, 144))]))
    assert learnt(processor, inputs).split() == ["7</s>", "two</s>"]


def test_every_token_of_a_document(processor):
    inputs = encode_with_labels(processor, Document("The star is red."))
    assert torch.equal(inputs["labels"], inputs["input_ids"])


TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@pytest.fixture(scope="module")
def joining():
    """Byte-level BPE that joins a space with what follows, under a template that ends in a space before the answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("n", "o"), ("Ġ", "no")]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = TEMPLATE
    return wrapped


def test_a_token_across_the_end_of_the_prompt_is_the_answers(joining):
    messages = [turn("user", "What color?"), turn("assistant", "red"), turn("user", "Red?"), turn("assistant", "no")]
    inputs = encode_with_labels(joining, Conversation(messages))
    labels = inputs["labels"][0]
    parts = (labels != IGNORED).nonzero().flatten()
    starts = [int(one) for one in parts if int(one) - 1 not in parts.tolist()]
    answers = [joining.decode(inputs["input_ids"][0][one : one + 2]) for one in starts]
    assert answers == [" red\n", " no\n"]
    assert len(parts) == 4


def test_a_prompt_that_ends_within_a_token_of_the_conversation_is_told(joining):
    asked, answered = [turn("user", "What color?")], [turn("user", "What color?"), turn("assistant", "red")]
    assert joins_answer(joining, Conversation(asked), Conversation(answered))
    found = _joined(joining, [Question("color", "text", "What color?", answer) for answer in ("red", "no")])
    assert found == {"joined_prompts": 2}
    record = {"tasks": {}, "average": 0.0, "baseline_average": None, "retention": None}
    assert "models answer behind tokens that they were not trained on" in evaluation_table(record | found)
    assert "not trained on" in evaluated_notes({"evaluated": record | found})[0]  # on the page too
    assert "not trained on" not in evaluation_table(record)
    joining.chat_template = TEMPLATE.replace("ASSISTANT: ", "ASSISTANT:")
    assert not joins_answer(joining, Conversation(asked), Conversation(answered))
    joining.chat_template = TEMPLATE


def test_a_template_that_renders_a_beginning_otherwise_says_so(joining):
    joining.chat_template = "{{ messages | length }}" + TEMPLATE
    messages = [turn("user", "What color?"), turn("assistant", "red")]
    try:
        with pytest.raises(AnswersNotLocated, match="renders the beginning"):
            encode_with_labels(joining, Conversation(messages))
    finally:
        joining.chat_template = TEMPLATE
