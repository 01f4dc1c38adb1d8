"""Questions of the user's own: any source of conversations, of which the last turn of the assistant is the answer.

{"image": "a.jpg", "task": "colours", "conversations": [{"from": "human", "value": "<image>\\nWhat colour is it?"},
                                                        {"from": "gpt", "value": "red"}]}
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from lvlm_prune.data.content import digests_of_media
from lvlm_prune.data.conversation import Conversation, refuse_no_image
from lvlm_prune.data.source import CalibrationSource, name_of
from lvlm_prune.errors import RunError
from lvlm_prune.evaluation.metrics import suitable_metric
from lvlm_prune.evaluation.scores import Benchmark, Question
from lvlm_prune.output.questions import OF_CONTENT
from lvlm_prune.plugins import plugin_class


class LocalBenchmark(Benchmark):
    """Questions from a source of conversations, for example a file in LLaVA's JSON format.

    A record's `task` names its task; records without one form a task that is named after the file, and called
    `own questions` in a folder that is published. Images are opened when they are asked about.

    Args:
        source: Where the conversations come from. The last turn of the assistant is the right answer, what is before
            it is asked.
        num_samples: How many to ask. Default: all.
        seed: Another seed chooses others.
        metric: `exact_match`, `yes_no` (the first word decides), `relaxed_number` (within 5%), or `auto`: `yes_no`
            for tasks whose right answers are all yes or no, else `exact_match`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        source: CalibrationSource,
        num_samples: int | None = None,
        seed: int = 0,
        metric: Literal["auto", "exact_match", "yes_no", "relaxed_number"] = "auto",
    ) -> None:
        for name, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0)):
            if value is not None and value < least:
                raise ValueError(f"`{name}` {value}: must be at least {least}")
        self.source, self.num_samples, self.seed, self.metric = source, num_samples, seed, metric

    def check(self) -> None:
        """Open the source, read the chosen questions and look for their images.

        Raises:
            ValueError: Something is missing, or a record is no question with an answer.
        """
        self.source.setup()
        self.source.verify(self._chosen())
        self.questions  # noqa: B018  (read here, and refused where they are none)
        self._refuse_no_images()

    def _refuse_no_images(self) -> None:
        path, known = getattr(self.source, "path", plugin_class(self.source).__name__), set[Path]()
        for index in self._chosen():
            sample = self.source[index]
            for image in sample.images if isinstance(sample, Conversation) else ():
                if isinstance(image, Path) and image not in known:
                    known.add(image)
                    try:
                        refuse_no_image(image)
                    except RunError as error:
                        problem = f"{error}; every question counts, so mend it or take the record out"
                        raise ValueError(f"`source` {path}: {name_of(sample, index)}: {problem}") from None

    def fingerprint(self) -> str:
        """SHA-256 of the questions, of their answers and of what their images, videos and sounds hold."""
        known: dict[Path, str] = {}
        asked = [
            (each.task, each.group, each.question, each.answer, each.metric, digests_of_media(each.asked, known))
            for each in self.questions
        ]
        return OF_CONTENT + hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _chosen(self) -> list[int]:
        available = self.source.available
        if not available:
            raise ValueError(f"`source` {plugin_class(self.source).__name__}: holds no samples")
        if self.num_samples is not None and self.num_samples > available:
            problem = f"the source holds only {available} sample{'' if available == 1 else 's'}"
            raise ValueError(f"`num_samples` {self.num_samples}: {problem}")
        return self.source.choose(self.num_samples or available, self.seed)

    @cached_property
    def questions(self) -> list[Question]:
        """The questions, in the order of the source."""
        found: dict[str, list[tuple[int, Conversation, str]]] = {}
        path = getattr(self.source, "path", None)
        default = Path(path).stem if path else plugin_class(self.source).__name__
        for index in self._chosen():
            try:
                sample = self.source[index]
            except RunError as error:
                raise ValueError(f"`source` {path or default}: {name_of(error, index)}: {error}") from None
            try:
                answer = _answer_of(sample)
            except RunError as error:
                raise ValueError(f"`source` {path or default}: {name_of(sample, index)} {error}") from None
            assert isinstance(sample, Conversation)
            found.setdefault(sample.task or default, []).append((index, sample, answer))
        metrics = {
            task: suitable_metric([answer for *_, answer in members]) if self.metric == "auto" else self.metric
            for task, members in found.items()
        }
        questions = {
            index: Question(
                task,
                "vision" if sample.images or sample.videos else "audio" if sample.audios else "text",
                " ".join(part["text"] for turn in sample.messages[:-1] for part in turn["content"] if "text" in part),
                answer,
                metric=metrics[task],
                read=partial(_asked, self.source, index),
                image_names=tuple(
                    str(image) if isinstance(image, Path) else f"image {place} of sample {index}"
                    for place, image in enumerate(sample.images)
                ),
            )
            for task, members in found.items()
            for index, sample, answer in members
        }
        return [questions[index] for index in sorted(questions)]


def _answer_of(sample: object) -> str:
    if not isinstance(sample, Conversation):
        raise RunError("is no conversation: there is nothing to ask")
    if len(sample.messages) < 2 or sample.messages[-1]["role"] != "assistant":
        raise RunError("does not end with a turn of the assistant behind a question: there is no right answer")
    if not any(part.get("text", part["type"]).strip() for turn in sample.messages[:-1] for part in turn["content"]):
        raise RunError("asks nothing")
    answer = "".join(part.get("text", "") for part in sample.messages[-1]["content"]).strip()
    if not answer:
        raise RunError("has an empty answer")
    return answer


def _asked(source: CalibrationSource, index: int) -> Conversation:
    sample = source[index]
    assert isinstance(sample, Conversation)
    return sample.beginning(len(sample.messages) - 1)
