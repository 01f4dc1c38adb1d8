"""How likely models hold the right answers: perplexity, and how far the pruned model is from the dense one.

dense model ─► perplexity; what it says before each answer token ─► on disk     ─┐ one model in memory at a time
pruned model ─► perplexity; divergence from what lies there                     ─┘
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import SumMetric
from torchmetrics.text import Perplexity

from lvlm_prune.data.batches import Inputs
from lvlm_prune.data.bucketing import BucketedLoader
from lvlm_prune.data.labels import AnswersNotLocated, encode_with_labels, label_last_answer, only_last
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.data.processing import pad_token_of, refusals, render, tokenizer_of
from lvlm_prune.data.recovery import SAMPLE_NUMBER
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import RunError, shortened
from lvlm_prune.evaluation.scores import Question
from lvlm_prune.evaluation.shared_images import Answer, SharedImages
from lvlm_prune.module import LVLMModule
from lvlm_prune.recovery.dense import each_answer
from lvlm_prune.recovery.distillation import Distillation, Teacher


class AnswerLikelihood:
    """Asks models about the tokens of right answers, each sample on one process, all about one image on the same.

    Args:
        questions: With their answers.
        batch_size: Samples per forward.
        top_k: Logits of the dense model that are kept per answer token; with a larger vocabulary the divergence is that
            of k + 1 outcomes, all others being one, and never more than the exact one.
        folder: A folder of this process, for what the dense model says.
        processes: All processes.
    """

    def __init__(
        self, questions: Sequence[Question], batch_size: int, top_k: int, folder: Path, processes: Processes
    ) -> None:
        self.questions, self.batch_size, self.processes = questions, batch_size, processes
        self.folder, self.top_k = folder, top_k
        self.numbers = _dealt(questions, processes)

    def leave_out(self, module: LVLMModule, processor: Any) -> dict[int, str]:
        """Leave out questions whose right answers cannot be found among the tokens of this model's template.

        Returns:
            Number of each of them, of all processes, and why.
        """
        limits = ModelLimits.of(module.model)
        own = {number: _why_not(processor, self.questions[number], limits) for number in self.numbers}
        own = {number: cause for number, cause in own.items() if cause}
        self.numbers = [number for number in self.numbers if number not in own]
        return dict(sorted(item for part in self.processes.gather(own) for item in part.items()))

    @torch.no_grad()
    def dense(self, module: LVLMModule, processor: Any, progress: Callable[[int], object]) -> float | None:
        """Perplexity of the dense model, a whole model in memory; keeps what it says."""
        perplexity, answers = self._metric(Perplexity, module.device), self._answers(module, processor)

        def logits_of(numbers: Sequence[int]) -> dict[int, Tensor]:
            found = {}
            for number, logits, tokens in answers(numbers, self.batch_size):
                perplexity.update(logits[None], tokens[None])
                found[number] = logits
            return found

        options = Distillation(1.0, temperature=1.0, top_k=self.top_k)
        self._teacher = Teacher(self.folder, options, self.numbers, {})
        self._teacher.write(logits_of, progress)
        return self._computed(perplexity)

    @torch.no_grad()
    def pruned(
        self, module: LVLMModule, processor: Any, progress: Callable[[int], object], compare: bool
    ) -> tuple[float | None, float | None]:
        """Perplexity, and with `compare` the mean divergence KL(dense ‖ pruned) per answer token in nats, else None."""
        perplexity = self._metric(Perplexity, module.device)
        divergence, count = (self._metric(SumMetric, module.device, nan_strategy="disable") for _ in range(2))
        for number, logits, answer in self._answers(module, processor)(self.numbers, self.batch_size):
            perplexity.update(logits[None], answer[None])
            if compare:
                divergence.update(self._teacher.divergence(logits, [number]))
                count.update(len(answer))
            progress(1)
        if not compare:
            return self._computed(perplexity), None
        summed, tokens = self._computed(divergence), self._computed(count)
        return self._computed(perplexity), summed / tokens if summed is not None and tokens else None

    def _metric(self, kind: Any, device: torch.device, **options: Any) -> Any:
        return kind(sync_on_compute=self.processes.count > 1, **options).to(device)

    def _computed(self, metric: Any) -> float | None:
        """Its value over all processes; None where it is not finite."""
        self.processes.agree()
        value = metric.compute().item()
        return value if math.isfinite(value) else None

    def _answers(self, module: LVLMModule, processor: Any) -> SharedImages:
        limits = ModelLimits.of(module.model)
        padding = limits.padding(pad_token_of(processor))

        def encoded(number: int) -> Inputs:
            return _encoded(processor, self.questions[number], limits)

        def numbered(number: int) -> Inputs:
            return encoded(number) | {SAMPLE_NUMBER: torch.tensor([number])}

        def plain(numbers: Sequence[int]) -> Iterator[Answer]:
            batches = BucketedLoader(numbers, numbered, self.batch_size, seed=None, pad_token_id=padding)
            return each_answer(module, batches, module.device)

        return SharedImages(module, processor, self.questions, encoded, plain)


def _dealt(questions: Sequence[Question], processes: Processes) -> list[int]:
    """Numbers of the questions of this process, those about the same image one after the other, on one process."""
    by_image: dict[Hashable, list[int]] = {}
    for number, question in enumerate(questions):
        by_image.setdefault(question.image_keys or number, []).append(number)
    dealt = list(by_image.values())
    if len(dealt) < processes.count:
        dealt = [[number] for numbers in dealt for number in numbers]
    return [number for numbers in dealt[processes.rank :: processes.count] for number in numbers]


def _why_not(processor: Any, question: Question, limits: ModelLimits) -> str:
    """Why the right answer cannot be found among the tokens; empty where it can, or something else is wrong.

    The text alone tells it, and needs no image; where that finds nothing the processor's own tokens decide.
    """
    try:
        with refusals(processor):
            sample = question.answered
            ids = tokenizer_of(processor)(render(processor, sample.messages), add_special_tokens=False)["input_ids"]
            label_last_answer(processor, sample, torch.tensor([ids]))
    except RunError:
        try:
            _encoded(processor, question, limits)
        except RunError as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, AnswersNotLocated):
                    return str(cause)
                cause = cause.__cause__
    return ""


def _encoded(processor: Any, question: Question, limits: ModelLimits) -> Inputs:
    """Model inputs with `labels` on the right answer, its end token included, and on no earlier turn.

    Raises:
        RunError: The processor or the model refuses the question.
    """
    try:
        with refusals(processor):
            limits.refuse_media(processor, question.answered)
            inputs = encode_with_labels(processor, question.answered)
        limits.refuse(inputs)
    except RunError as error:
        raise RunError(f"the question '{shortened(question.question)}' of task {question.task}: {error}") from error
    return inputs | {"labels": only_last(inputs["labels"])}
