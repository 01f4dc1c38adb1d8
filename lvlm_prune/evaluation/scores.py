"""Questions with exact answers, and what comes out of asking them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

Group = Literal["vision", "text"]


@dataclass(frozen=True)
class Question:
    """A question with its one right answer. Questions about the same image should share the image object."""

    task: str
    group: Group
    question: str
    answer: str
    image: Image.Image | None = None


class Benchmark(ABC):
    """A set of questions. The constructor only keeps its arguments."""

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
    """Accuracy per task in [0, 1], number of questions per task, and the group of each task.

    Example:
        >>> scores = Scores({"color": 0.5, "place": 1.0, "facts": 0.25}, {"color": 8, "place": 8, "facts": 4},
        ...                 {"color": "vision", "place": "vision", "facts": "text"})
        >>> scores.groups, round(scores.average, 4)
        ({'vision': 0.75, 'text': 0.25}, 0.5833)
    """

    tasks: dict[str, float]
    counts: dict[str, int]
    task_groups: dict[str, str]

    @property
    def groups(self) -> dict[str, float]:
        """Mean accuracy over the tasks of each group."""
        return _means(self.tasks, self.task_groups)

    @property
    def average(self) -> float:
        """Mean accuracy over all tasks, each counting the same."""
        return sum(self.tasks.values()) / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "average": self.average,
            "groups": self.groups,
            "tasks": dict(self.tasks),
            "counts": dict(self.counts),
            "task_groups": dict(self.task_groups),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Scores":
        """Inverse of :meth:`to_dict`."""
        return cls(dict(saved["tasks"]), dict(saved["counts"]), dict(saved["task_groups"]))


@dataclass(frozen=True)
class Retention:
    """Share of the dense model's accuracy that is left: per task, and the mean over tasks per group and in all."""

    tasks: dict[str, float]
    groups: dict[str, float]
    average: float

    def to_dict(self) -> dict[str, Any]:
        return {"average": self.average, "groups": dict(self.groups), "tasks": dict(self.tasks)}


def retention(pruned: Scores, dense: Scores) -> Retention:
    """Accuracy of the pruned model divided by that of the dense one, task by task.

    Tasks that the dense model never gets right have no retention and are left out.

    Raises:
        ValueError: The two were not scored on the same questions, or `dense` is zero everywhere.

    Example:
        >>> groups = {"color": "vision", "facts": "text"}
        >>> dense = Scores({"color": 1.0, "facts": 0.8}, {"color": 10, "facts": 10}, groups)
        >>> pruned = Scores({"color": 0.9, "facts": 0.4}, {"color": 10, "facts": 10}, groups)
        >>> retention(pruned, dense).to_dict()
        {'average': 0.7, 'groups': {'vision': 0.9, 'text': 0.5}, 'tasks': {'color': 0.9, 'facts': 0.5}}
    """
    if pruned.counts != dense.counts:
        raise ValueError(f"`pruned` and `dense` must be scored on the same questions: {pruned.counts}, {dense.counts}")
    tasks = {task: pruned.tasks[task] / accuracy for task, accuracy in dense.tasks.items() if accuracy > 0}
    if not tasks:
        raise ValueError("`dense` has an accuracy of zero on every task")
    return Retention(tasks, _means(tasks, dense.task_groups), sum(tasks.values()) / len(tasks))
