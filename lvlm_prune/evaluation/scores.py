"""Questions with one right answer, and what comes out of asking them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from PIL import Image

from lvlm_prune.data.conversation import Conversation
from lvlm_prune.errors import LONGEST_VALUE, RunError, shortened
from lvlm_prune.evaluation.metrics import MetricName

Group = Literal["vision", "text", "audio"]


@dataclass(frozen=True)
class Question:
    """A question with its one right answer.

    Args:
        task: What it is scored under.
        group: What it is about: something seen, something heard, or text alone.
        question: What is asked, as text.
        answer: The right answer.
        image: What it is about. Questions about the same image should share the object.
        metric: How an answer is held against the right one, the same for all questions of a task.
        read: Gives the turns to ask, with their images, each time when they are needed; default: `question` about
            `image`.
        image_names: Of the images that `read` gives: equal names, equal images.
    """

    task: str
    group: Group
    question: str
    answer: str
    image: Image.Image | None = None
    metric: MetricName = "exact_match"
    read: Callable[[], Conversation] | None = None
    image_names: tuple[str, ...] = ()

    @property
    def asked(self) -> Conversation:
        """The conversation up to the answer: what the model is given."""
        if self.read is not None:
            return self.read()
        content: list[dict[str, str]] = [{"type": "text", "text": self.question}]
        if self.image is not None:
            content.insert(0, {"type": "image"})
        return Conversation([{"role": "user", "content": content}], [] if self.image is None else [self.image])

    @property
    def answered(self) -> Conversation:
        """The same turns with the right answer behind them."""
        asked = self.asked
        turn = {"role": "assistant", "content": [{"type": "text", "text": self.answer}]}
        return replace(asked, messages=[*asked.messages, turn])

    @property
    def image_keys(self) -> tuple[Hashable, ...]:
        """One per image; equal for equal images."""
        return self.image_names if self.image is None else (id(self.image),)


class Benchmark(ABC):
    """A set of questions. The constructor only keeps its arguments."""

    def check(self) -> None:  # noqa: B027
        """Refuse what can be seen to be wrong before a model is loaded.

        Raises:
            ValueError: For example, a file is missing; the message begins with the argument in backticks.
        """

    def fingerprint(self) -> str:
        """Tells questions apart that come from elsewhere, as a file that may change; empty where none do."""
        return ""

    @property
    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """The questions, always in the same order."""


def _means(values: Mapping[str, float], task_groups: Mapping[str, str]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for task, value in values.items():
        grouped.setdefault(task_groups[task], []).append(value)
    return {group: sum(members) / len(members) for group, members in grouped.items()}


@dataclass(frozen=True)
class Scores:
    """Score per task, number of questions per task, and the group of each task.

    Args:
        tasks: Task -> score, for most an accuracy in [0, 1].
        counts: Task -> number of questions.
        task_groups: Task -> group.
        metrics: Task -> what was measured, where that is told.
        full_marks: Task -> best possible score, where that is not 1.

    Raises:
        RunError: There is no task.

    Example:
        >>> scores = Scores({"color": 0.5, "place": 1.0, "facts": 0.25}, {"color": 8, "place": 8, "facts": 4},
        ...                 {"color": "vision", "place": "vision", "facts": "text"})
        >>> scores.groups, round(scores.average, 4)
        ({'vision': 0.75, 'text': 0.25}, 0.5833)
    """

    tasks: dict[str, float]
    counts: dict[str, int]
    task_groups: dict[str, str]
    metrics: dict[str, str] = field(default_factory=dict)
    full_marks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise RunError("nothing was scored: the engine has no task")

    @property
    def shares(self) -> dict[str, float]:
        """Task -> score as a share of the best possible one."""
        return {task: score / self.full_marks.get(task, 1.0) for task, score in self.tasks.items()}

    @property
    def groups(self) -> dict[str, float]:
        """Mean share over the tasks of each group."""
        return _means(self.shares, self.task_groups)

    @property
    def average(self) -> float:
        """Mean share over all tasks, each counting the same."""
        return sum(self.shares.values()) / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        optional = {"metrics": dict(self.metrics), "full_marks": dict(self.full_marks)}
        return {
            "average": self.average,
            "groups": self.groups,
            "tasks": dict(self.tasks),
            "counts": dict(self.counts),
            "task_groups": dict(self.task_groups),
        } | {name: values for name, values in optional.items() if values}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Scores":
        """Inverse of :meth:`to_dict`."""
        optional = {name: dict(saved[name]) for name in ("metrics", "full_marks") if name in saved}
        return cls(dict(saved["tasks"]), dict(saved["counts"]), dict(saved["task_groups"]), **optional)


@dataclass(frozen=True)
class Retention:
    """Share of the dense model's accuracy that is left: per task, and the mean over tasks per group and in all."""

    tasks: dict[str, float]
    groups: dict[str, float]
    average: float

    def to_dict(self) -> dict[str, Any]:
        return {"average": self.average, "groups": dict(self.groups), "tasks": dict(self.tasks)}


def refuse_unanswered(dense: Scores) -> Scores:
    """The scores of a dense model, of which a share can be retained.

    Raises:
        RunError: It gets no question right.
    """
    if not any(dense.tasks.values()):
        raise RunError("the dense model gets none of the questions right, so that no share of it can be retained")
    return dense


def retention(pruned: Scores, dense: Scores) -> Retention:
    """Accuracy of the pruned model divided by that of the dense one, task by task.

    Tasks that the dense model never gets right have no retention and are left out.

    Raises:
        RunError: The two were not scored on the same questions, or `dense` is zero everywhere.

    Example:
        >>> groups = {"color": "vision", "facts": "text"}
        >>> dense = Scores({"color": 1.0, "facts": 0.8}, {"color": 10, "facts": 10}, groups)
        >>> pruned = Scores({"color": 0.9, "facts": 0.4}, {"color": 10, "facts": 10}, groups)
        >>> retention(pruned, dense).to_dict()
        {'average': 0.7, 'groups': {'vision': 0.9, 'text': 0.5}, 'tasks': {'color': 0.9, 'facts': 0.5}}
    """
    if pruned.counts != dense.counts:
        asked, others = (shortened(scores.counts, LONGEST_VALUE) for scores in (pruned, dense))
        raise RunError(f"no retention: the two models were not asked the same questions ({asked}; dense: {others})")
    tasks = {task: pruned.tasks[task] / accuracy for task, accuracy in dense.tasks.items() if accuracy > 0}
    if not tasks:
        raise RunError("no retention: the dense model has an accuracy of zero on every task")
    return Retention(tasks, _means(tasks, dense.task_groups), sum(tasks.values()) / len(tasks))
