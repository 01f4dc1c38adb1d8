"""Answer tokens are found among the tokens of a conversation, whatever comes before them."""

import pytest
import torch
from PIL import Image

from lvlm_prune.data import Conversation, Document
from lvlm_prune.data.labels import IGNORED, encode_with_labels
from lvlm_prune.demo.datasets import QuestionConversations
from lvlm_prune.demo.processing import build_processor, build_tokenizer


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
