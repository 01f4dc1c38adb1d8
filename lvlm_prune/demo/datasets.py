"""Conversations in the Hugging Face chat format: captions to calibrate on, questions to recover on.

Each item is a dict, a function of (split, seed, index):

    {"id": "calibration/0/7",
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "The image shows ..."}]}],
     "images": [<PIL.Image 144 x 144>]}
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, overload

from PIL import Image

from lvlm_prune.demo.questions import TEXT_TASKS, QuestionAnswer, caption, text_question, vision_questions
from lvlm_prune.demo.splits import Split, random_for
from lvlm_prune.demo.world import draw_indexed

Conversation = dict[str, Any]


def conversation(identifier: str, asked: QuestionAnswer, image: Image.Image | None) -> Conversation:
    """A question and its answer, with the image first where there is one."""
    content: list[dict[str, str]] = [{"type": "text", "text": asked.question}]
    if image is not None:
        content.insert(0, {"type": "image"})
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": asked.answer}]},
    ]
    return {"id": identifier, "messages": messages, "images": [] if image is None else [image]}


class _Conversations(Sequence[Conversation]):
    def __init__(self, split: Split, seed: int, length: int) -> None:
        if length < 1:
            raise ValueError(f"`length` must be positive, got {length}")
        random_for("check", split, seed, 0)  # refuses an unknown split now, not at the first item
        self.split, self.seed, self.length = split, seed, length

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self._make(position) for position in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} conversations")
        return self._make(index % self.length)

    @abstractmethod
    def _make(self, index: int) -> Conversation: ...

    def _identifier(self, index: int) -> str:
        return f"{self.split}/{self.seed}/{index}"


class CalibrationCaptions(_Conversations):
    """Images with captions of 40 to 100 words.

    Args:
        split: Split of the images.
        seed: Another seed gives other images of the same split.
        length: Number of conversations.

    Example:
        >>> item = CalibrationCaptions()[0]
        >>> item["id"], item["messages"][0]["content"][1]["text"], item["images"][0].size
        ('calibration/0/0', 'What is in the picture?', (144, 144))
    """

    def __init__(self, split: Split = "calibration", seed: int = 0, length: int = 1024) -> None:
        super().__init__(split, seed, length)

    def _make(self, index: int) -> Conversation:
        scene, image, _ = draw_indexed(self.split, self.seed, index)
        asked = caption(scene, random_for("caption", self.split, self.seed, index))
        return conversation(self._identifier(index), asked, image)


class QuestionConversations(_Conversations):
    """Questions with their answers, two of three about an image; one question each.

    Args:
        split: Split of images and questions.
        seed: Another seed gives other items of the same split.
        length: Number of conversations.

    Example:
        >>> item = QuestionConversations("train")[0]
        >>> item["messages"][0]["content"][-1]["text"], item["messages"][1]["content"][0]["text"]
        ('Count the red objects.', 'one')
    """

    def __init__(self, split: Split = "train", seed: int = 0, length: int = 8192) -> None:
        super().__init__(split, seed, length)

    def _make(self, index: int) -> Conversation:
        rng = random_for("conversation", self.split, self.seed, index)
        if index % 3 == 2:
            asked = text_question(rng.choice(TEXT_TASKS), self.split, rng)
            return conversation(self._identifier(index), asked, None)
        scene, image, _ = draw_indexed(self.split, self.seed, index)
        return conversation(self._identifier(index), rng.choice(vision_questions(scene, rng)), image)
