"""The embedded model's own data: captions to calibrate on, questions to recover on."""

from __future__ import annotations

from typing import Any, ClassVar

from lvlm_prune.data.conversation import Conversation
from lvlm_prune.data.source import CalibrationSource


class EmbeddedSource(CalibrationSource):
    """Captions of generated pictures, which come with the embedded model and need no file."""

    default_num_samples: ClassVar[int | None] = 96

    def __init__(self) -> None:
        self._captions: Any = None

    def setup(self) -> None:
        if self._captions is None:
            # The pictures are drawn by code that a user of other sources never needs.
            from lvlm_prune.demo.datasets import CalibrationCaptions

            self._captions = CalibrationCaptions()

    def __len__(self) -> int:
        self.setup()
        return len(self._captions)

    def __getitem__(self, index: int) -> Conversation:
        self.setup()
        item = self._captions[index]
        return Conversation(item["messages"], item["images"], id=item["id"])


class EmbeddedQuestions(CalibrationSource):
    """Questions about generated pictures, and questions without a picture, each with its answer.

    They come from the training split of the embedded model's world, which shares neither question nor picture with the
    test split that the embedded benchmark asks about.

    Args:
        length: Number of conversations.
        seed: Another seed gives other conversations of the same split.
    """

    default_num_samples: ClassVar[int | None] = None

    def __init__(self, length: int = 4096, seed: int = 0) -> None:
        if length < 2:
            raise ValueError(f"`length` {length}: must be at least 2")
        self.length, self.seed = length, seed
        self._questions: Any = None

    def setup(self) -> None:
        if self._questions is None:
            from lvlm_prune.demo.datasets import QuestionConversations

            self._questions = QuestionConversations("train", self.seed, self.length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Conversation:
        self.setup()
        item = self._questions[index]
        return Conversation(item["messages"], item["images"], id=item["id"])
