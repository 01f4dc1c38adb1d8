"""What the embedded model is recovered on has nothing of what it is tested on."""

from lvlm_prune.data import EmbeddedQuestions, EmbeddedSource
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark


def test_no_question_or_picture_of_the_test_split():
    source = EmbeddedQuestions(length=400)
    tested = EmbeddedBenchmark(num_images=40, num_text=400).questions
    pictures = {question.image.tobytes() for question in tested if question.image is not None}
    texts = {question.question for question in tested if question.image is None}
    for index in range(len(source)):
        item = source[index]
        if item.images:
            assert item.images[0].tobytes() not in pictures
        else:
            assert item.messages[0]["content"][0]["text"] not in texts


def test_another_seed_gives_other_conversations():
    assert EmbeddedQuestions(seed=1)[0].messages != EmbeddedQuestions(seed=2)[0].messages
    assert len(EmbeddedSource()) > 0
