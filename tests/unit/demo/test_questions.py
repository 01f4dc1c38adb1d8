"""Questions have one right answer, and those of different splits have nothing in common."""

import re
from random import Random

import pytest

from lvlm_prune.demo.datasets import CalibrationCaptions, QuestionConversations
from lvlm_prune.demo.facts import COUNTRIES, FACT_WORDINGS, SIGN_MEANINGS
from lvlm_prune.demo.questions import (
    TEXT_TASKS,
    VISION_TASKS,
    caption,
    direction,
    fact_wording,
    text_question,
    vision_questions,
)
from lvlm_prune.demo.splits import SPLITS, random_for
from lvlm_prune.demo.world import COLORS, PLACES, SHAPES, scene
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark


def answer_by_looking(task, question, described):
    """What a reader would answer: parses the English question, knows nothing of the generator."""
    words = re.findall(r"[a-z0-9]+", question.lower())
    colors = [word for word in words if word in COLORS]
    shapes = [shape for word in words for shape in SHAPES if word in (shape, shape + "s", shape + "es")]

    def matching(position=0):
        return [
            thing
            for thing in described.things
            if thing.color in colors[position : position + 1] + [thing.color] * (len(colors) <= position)
            and thing.shape in shapes[position : position + 1] + [thing.shape] * (len(shapes) <= position)
        ]

    if task == "existence":
        return "yes" if matching() else "no"
    if task == "counting":
        return ["zero", "one", "two", "three", "four"][len(matching())]
    if task == "reading":
        return str(described.number)
    if task == "reading_arithmetic":
        return str(described.number + int(next(word for word in words if word.isdigit())))
    if task == "relation":
        first, second = matching(0), matching(1)
        assert len(first) == len(second) == 1
        thing, other = (second[0], first[0]) if question.startswith("From") else (first[0], second[0])
        down, right = thing.cell // 3 - other.cell // 3, thing.cell % 3 - other.cell % 3
        assert (down == 0) != (right == 0)
        return {(-1, 0): "above", (1, 0): "below", (0, -1): "left", (0, 1): "right"}[
            (down > 0) - (down < 0), (right > 0) - (right < 0)
        ]
    (thing,) = matching()  # the question names exactly one thing
    meaning = SIGN_MEANINGS[thing.color, thing.shape]
    return {"color": thing.color, "shape": thing.shape, "place": PLACES[thing.cell], "symbol": meaning}[task]


def test_answers_about_images_are_those_of_a_reader():
    seen = set()
    for index in range(400):
        described = scene("train", 0, index)
        for asked in vision_questions(described, Random(index)):
            assert asked.answer == answer_by_looking(asked.task, asked.question, described), (asked, described)
            seen.add(asked.task)
    assert seen == set(VISION_TASKS)


def test_answers_without_an_image_are_right():
    rng = Random(0)
    for _ in range(500):
        asked = text_question("arithmetic", "train", rng)
        one, two = map(int, re.findall(r"\d+", asked.question))
        value = one + two if re.search(r"plus|Add", asked.question) else one - two
        assert asked.answer == str(value if "Take" not in asked.question else two - one)
        asked = text_question("sorting", "train", rng)
        letters = re.findall(r"\b[a-z]\b", asked.question)
        assert asked.answer.split() == sorted(letters)
        assert len(letters) == 4
        asked = text_question("comparing", "train", rng)
        numbers = list(map(int, re.findall(r"\d+", asked.question)))
        assert int(asked.answer) == (max(numbers) if "larger" in asked.question else min(numbers))


def item(task, question):
    """What a question without an image asks for: what must not occur in two splits."""
    if task == "sorting":
        return tuple(sorted(re.findall(r"\b[a-z]\b", question)))
    if task == "facts":
        return question
    sign = "+" if re.search(r"plus|Add", question) else "-"
    return (sign if task == "arithmetic" else "", *sorted(map(int, re.findall(r"\d+", question))))


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_text_questions_of_different_splits_are_disjoint(task):
    items = {}
    for split in SPLITS:
        rng = Random(split)
        items[split] = {item(task, text_question(task, split, rng).question) for _ in range(3000)}
    for split in SPLITS:
        for other in SPLITS:
            assert split == other or not items[split] & items[other]


def test_benchmark_calibration_and_training_share_no_question():
    def asked(conversations):
        return {
            (item["images"][0].tobytes() if item["images"] else None, item["messages"][0]["content"][-1]["text"])
            for item in conversations
        }

    benchmark = EmbeddedBenchmark(num_images=60, num_text=200, seed=5).questions
    test = {(question.image.tobytes() if question.image else None, question.question) for question in benchmark}
    training = asked(QuestionConversations("train", seed=5, length=600))
    calibration = asked(CalibrationCaptions(seed=5, length=200))
    assert not test & training
    assert not {image for image, _ in test if image} & {image for image, _ in training | calibration if image}


def test_each_fact_is_taught_in_three_wordings_and_tested_in_another():
    for kind, wordings in FACT_WORDINGS.items():
        for country, _, _ in COUNTRIES:
            rng = Random(country)
            taught = {fact_wording(kind, country, "train", rng) for _ in range(60)}
            heldout = [fact_wording(kind, country, split, rng) for split in ("validation", "calibration", "test")]
            assert len(taught) == len(set(heldout)) == 3
            assert taught | set(heldout) == set(wordings)


def test_facts_have_one_answer():
    assert (
        len({country for country, _, _ in COUNTRIES}) == len({capital for _, capital, _ in COUNTRIES}) == len(COUNTRIES)
    )
    assert len(set(SIGN_MEANINGS.values())) == 36


def test_captions_have_40_to_100_words_and_are_true():
    for index in range(300):
        described = scene("calibration", 0, index)
        text = caption(described, random_for("caption", "calibration", 0, index)).answer
        assert 40 <= len(text.split()) <= 100
        for thing in described.things:
            assert f"A {thing.size} {thing.name} is at the {PLACES[thing.cell]}." in text
        empty = re.findall(r"The ([a-z ]+) is empty\.", text)
        assert not {PLACES[thing.cell] for thing in described.things} & set(empty)
        assert (f"The number {described.number} is" in text) == (described.number is not None)


def test_relation_needs_a_common_row_or_column():
    described = next(s for s in (scene("train", 0, i) for i in range(99)) if len(s.things) == 4)
    for one in described.things:
        for two in described.things:
            if one is not two:
                opposite = {"left": "right", "right": "left", "above": "below", "below": "above", None: None}
                assert direction(two, one) == opposite[direction(one, two)]


def test_conversations_are_in_the_chat_format():
    for conversations in (CalibrationCaptions(length=4), QuestionConversations(length=6)):
        for conversation in conversations:
            user, assistant = conversation["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            kinds = [part["type"] for part in user["content"]]
            assert kinds == ["image"] * len(conversation["images"]) + ["text"]
            assert all(image.size == (144, 144) for image in conversation["images"])
    assert len({conversation["id"] for conversation in QuestionConversations(length=6)}) == 6
    with pytest.raises(IndexError):
        CalibrationCaptions(length=4)[4]
