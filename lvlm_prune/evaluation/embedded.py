"""Questions of the test split, in the form that the scorer takes."""

from functools import cached_property

from lvlm_prune.demo.questions import TEXT_TASKS, text_question, vision_questions
from lvlm_prune.demo.splits import Split, random_for
from lvlm_prune.demo.world import draw_indexed
from lvlm_prune.evaluation.scores import Benchmark, Question

__all__ = ["EmbeddedBenchmark", "Question"]


class EmbeddedBenchmark(Benchmark):
    """Questions about generated images, one of each task that an image allows, and questions without an image.

    Args:
        num_images: Number of images; about eight questions are asked about each.
        num_text: Number of questions without an image, the same number of each task.
        seed: Another seed gives other images and questions of the same split.
        split: Split from which they are taken.

    Raises:
        ValueError: A number is negative, or no question is left.

    Example:
        >>> questions = EmbeddedBenchmark(num_images=1, num_text=4).questions
        >>> [question.answer for question in questions if question.group == "text"]
        ['8', 'Namibia', 'a l o v', '68']
    """

    def __init__(self, num_images: int = 300, num_text: int = 600, seed: int = 0, split: Split = "test") -> None:
        for name, value in (("num_images", num_images), ("num_text", num_text), ("seed", seed)):
            if value < 0:
                raise ValueError(f"`{name}` {value}: must not be negative")
        if num_images + num_text == 0:
            raise ValueError("`num_images` 0: with `num_text` 0 leaves no question")
        self.num_images, self.num_text, self.seed, self.split = num_images, num_text, seed, split

    @cached_property
    def questions(self) -> list[Question]:
        questions = []
        for index in range(self.num_images):
            scene, image, _ = draw_indexed(self.split, self.seed, index)
            for asked in vision_questions(scene, random_for("benchmark", self.split, self.seed, index)):
                questions.append(Question(asked.task, "vision", asked.question, asked.answer, image))
        for index in range(self.num_text):
            rng = random_for("benchmark text", self.split, self.seed, index)
            asked = text_question(TEXT_TASKS[index % len(TEXT_TASKS)], self.split, rng)
            questions.append(Question(asked.task, "text", asked.question, asked.answer))
        return questions
