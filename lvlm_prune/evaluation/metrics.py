"""How an answer is held against the right one, as metrics of torchmetrics."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

MetricName = Literal["exact_match", "yes_no", "relaxed_number"]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)\s*%?")


class AnswerAccuracy(Metric):
    """Share of answers that are right. Subclass it and say when one is."""

    higher_is_better = True
    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def is_right(given: str, answer: str) -> bool:
        """Whether the model's answer counts as the right one."""

    def update(self, given: Sequence[str], answers: Sequence[str]) -> None:
        """Count answers.

        Args:
            given: Answers of the model, one for each question.
            answers: The right answer to each of these questions.
        """
        self.right += sum(self.is_right(one, right) for one, right in zip(given, answers, strict=True))
        self.total += len(given)

    def compute(self) -> Tensor:
        """Share of all answers so far that are right, a float64 scalar in [0, 1]."""
        return self.right.double() / self.total


class ExactMatch(AnswerAccuracy):
    """To the letter; white space around an answer does not count.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["two cats", "Two cats"], ["two cats", "two cats"])
        >>> metric.compute().item()
        0.5
    """

    @staticmethod
    def is_right(given: str, answer: str) -> bool:
        return given.strip() == answer.strip()


class YesNoAccuracy(AnswerAccuracy):
    """The first word decides, as in POPE and MME.

    Example:
        >>> metric = YesNoAccuracy()
        >>> metric.update(["Yes, there is a dog.", "No", "There is a dog."], ["yes", "yes", "yes"])
        >>> round(metric.compute().item(), 3)
        0.333
    """

    @staticmethod
    def is_right(given: str, answer: str) -> bool:
        return _first_word(given) == _first_word(answer)


class RelaxedNumber(AnswerAccuracy):
    """Numbers may be off by 5% of the right one, as in ChartQA; other answers must agree but for case.

    Example:
        >>> metric = RelaxedNumber()
        >>> metric.update(["104", "106", "1,040 %", "Rome"], ["100", "100", "1000%", "rome"])
        >>> metric.compute().item()
        0.75
    """

    tolerance = 0.05

    @staticmethod
    def is_right(given: str, answer: str) -> bool:
        found, right = as_number(given), as_number(answer)
        if found is None or right is None:
            return given.strip().lower() == answer.strip().lower()
        return found == right if right == 0 else abs(found - right) <= RelaxedNumber.tolerance * abs(right)


METRICS: dict[MetricName, type[AnswerAccuracy]] = {
    "exact_match": ExactMatch,
    "yes_no": YesNoAccuracy,
    "relaxed_number": RelaxedNumber,
}


def suitable_metric(answers: Sequence[str]) -> MetricName:
    """The metric that fits a task's right answers: `yes_no` where all are yes or no, else `exact_match`.

    Example:
        >>> suitable_metric(["Yes", "no."]), suitable_metric(["a cat", "no"])
        ('yes_no', 'exact_match')
    """
    yes_or_no = all(answer.strip(" .!").lower() in ("yes", "no") for answer in answers)
    return "yes_no" if yes_or_no else "exact_match"


def as_number(text: str) -> float | None:
    """The number that a text is, with or without a per cent sign and a full stop; None for anything else.

    Example:
        >>> as_number("1,040 %."), as_number("-2.5"), as_number("2 cats")
        (1040.0, -2.5, None)
    """
    text = text.strip().removesuffix(".")
    return float(text.rstrip("% ").replace(",", "")) if _NUMBER.fullmatch(text) else None


def _first_word(text: str) -> str:
    found = re.match(r"\W*(\w+)", text)
    return found[1].lower() if found else ""
