"""The built-in engine: answers to a benchmark's questions, without any other package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lvlm_prune.checkpoints.allocator import keeping_freed
from lvlm_prune.data.labels import joins_answer
from lvlm_prune.data.processing import load_processor
from lvlm_prune.demo import is_embedded
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import InputError, given_as
from lvlm_prune.evaluation.answers import score
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark
from lvlm_prune.evaluation.engine import Engine, Measurement
from lvlm_prune.evaluation.local import LocalBenchmark
from lvlm_prune.evaluation.scores import Benchmark, Question, Scores
from lvlm_prune.output.progress import Progress
from lvlm_prune.output.temporary import temporary_folder
from lvlm_prune.packed.folder import open_checkpoint
from lvlm_prune.plugins import lazy_default, own_instance

if TYPE_CHECKING:
    from lvlm_prune.evaluation.likelihood import AnswerLikelihood
    from lvlm_prune.module import LVLMModule

# Questions of which the prompt is held against the whole conversation.
_LOOKED_AT = 16

__all__ = ["BuiltinEngine", "EmbeddedBenchmark", "LocalBenchmark"]


class BuiltinEngine(Engine):
    """Loads a checkpoint as a user would and counts the questions that it answers rightly.

    Args:
        benchmark: What is asked: `EmbeddedBenchmark`, or `LocalBenchmark` with a data set of one's own.
        batch_size: Questions per batch.
        dtype: Precision in which the model answers; `auto` takes the checkpoint's own.
        likelihood: Whether `evaluate` also measures the perplexity of the right answers, and with a baseline how far
            the model is from it there: KL(dense ‖ pruned).
        top_k: Logits of the dense model that are kept for each answer token, on the disk of temporary files. Where the
            vocabulary is larger the divergence takes all other tokens for one, and is never more than the exact one.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        benchmark: Benchmark = lazy_default(EmbeddedBenchmark),
        batch_size: int = 128,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        likelihood: bool = True,
        top_k: int = 1024,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"`{name}` {value}: must be at least 1")
        self.benchmark: Benchmark = own_instance(benchmark)
        self.batch_size, self.dtype = batch_size, dtype
        self.likelihood, self.top_k = likelihood, top_k

    def check(self) -> None:
        """Open the benchmark, whose file may be missing or hold no questions; no model is loaded."""
        self.benchmark.check()

    def fingerprint(self) -> str:
        """SHA-256 of the questions where they come from a file; empty for the embedded ones."""
        return self.benchmark.fingerprint()

    def task_names(self) -> list[str]:
        """Names of the tasks that the benchmark's questions belong to, in their order."""
        return list(dict.fromkeys(question.task for question in self.benchmark.questions))

    def score(
        self,
        folder: Path,
        processes: Processes | None = None,
        device: torch.device | str = "cpu",
        title: str = "",
    ) -> Scores:
        """Accuracy per task; each question is answered by one process."""
        from lvlm_prune.module import LVLMModule

        with self._loaded(LVLMModule(str(folder), self.dtype), device) as (module, processor):
            return self._answer(module, processor, processes or Processes(), title)

    def measure(
        self,
        model: LVLMModule,
        baseline: LVLMModule | None,
        processes: Processes,
        device: torch.device,
    ) -> Measurement:
        """Accuracy per task, and how likely the right answers are."""
        from lvlm_prune.evaluation.likelihood import AnswerLikelihood
        from lvlm_prune.recovery.dense import refuse_other_tokens

        dense: Scores | None = None
        more: dict[str, Any] = {}
        if baseline is not None and self.likelihood:
            try:
                refuse_other_tokens(baseline, model)
            except InputError as error:
                raise InputError("baseline", error.value, error.problem) from None
        with temporary_folder() as scratch:
            questions = self.benchmark.questions
            likelihood = AnswerLikelihood(questions, self.batch_size, self.top_k, scratch, processes)
            share = len(likelihood.numbers)
            if baseline is not None:
                with self._loaded(baseline, device, "baseline") as (module, processor):
                    more |= _joined(processor, questions)
                    dense = self._answer(module, processor, processes, "baseline")
                    if self._finds_answers(likelihood, module, processor, more):
                        with Progress("Right answers, baseline", share, "answers", shown=processes.is_main) as progress:
                            more["baseline_perplexity"] = likelihood.dense(module, processor, progress.update)
            with self._loaded(model, device) as (module, processor):
                more |= _joined(processor, questions)
                scores = self._answer(module, processor, processes, "model")
                if self._finds_answers(likelihood, module, processor, more):
                    with Progress("Right answers, model", share, "answers", shown=processes.is_main) as progress:
                        found = likelihood.pruned(module, processor, progress.update, baseline is not None)
                    more["perplexity"], divergence = found
                    if baseline is not None:
                        more["kl"] = divergence
        return Measurement(scores, dense, more)

    def _finds_answers(
        self, likelihood: AnswerLikelihood, module: LVLMModule, processor: Any, more: dict[str, Any]
    ) -> bool:
        """Whether likelihoods are wanted, and right answers found among the tokens; `more` says why some are not."""
        if self.likelihood and "no_likelihood" not in more and (missing := likelihood.leave_out(module, processor)):
            cause, without = next(iter(missing.values())), len(missing) + more.get("likelihood_without", 0)
            if without == len(self.benchmark.questions):
                more["no_likelihood"] = cause
            else:
                more |= {"likelihood_without": without, "likelihood_cause": cause}
        return self.likelihood and "no_likelihood" not in more

    @contextmanager
    def _loaded(
        self, origin: LVLMModule, device: torch.device | str, option: str = "model.path"
    ) -> Iterator[tuple[LVLMModule, Any]]:
        """A whole model of its own in memory while the context is open, and its processor; an option named it."""
        from lvlm_prune.module import LVLMModule

        module = LVLMModule(
            origin.path if origin.folder is None else str(origin.folder.path),
            self.dtype,
            trust_remote_code=origin.trust_remote_code,
            attn_implementation=origin.attn_implementation,
        )
        with given_as(option):
            module.open(open_checkpoint)
            module.load_whole()
            assert module.folder is not None
            processor = load_processor(module.folder.path, module.trust_remote_code)
        with keeping_freed():
            try:
                yield module.to(device), processor
            finally:
                module.unload()

    def _answer(self, module: LVLMModule, processor: Any, processes: Processes, title: str) -> Scores:
        questions = self.benchmark.questions
        with Progress(f"Scoring {title}", len(questions), "questions", shown=processes.is_main) as progress:
            return score(module.model, processor, questions, self.batch_size, progress.update, processes)


def refuse_other_world(engine: Engine, model: LVLMModule) -> None:
    """Refuse to ask another model about the embedded model's world.

    Raises:
        InputError: The engine's benchmark is the embedded one, and the model is not.
    """
    embedded = isinstance(engine, BuiltinEngine) and isinstance(engine.benchmark, EmbeddedBenchmark)
    if embedded and model.folder is not None and not is_embedded(model.folder.path):
        problem = (
            f"asks about the embedded model's own world, and {model.path} is another model; give "
            "--engine.benchmark LocalBenchmark --engine.benchmark.source LlavaJsonSource "
            "--engine.benchmark.source.path QUESTIONS.json, or another --engine"
        )
        raise InputError("engine.benchmark", "EmbeddedBenchmark", problem)


def _joined(processor: Any, questions: Sequence[Question]) -> dict[str, int]:
    """Of the first questions, those whose prompt ends within a token of the whole conversation; empty without any."""
    joined = 0
    for question in questions[:_LOOKED_AT]:
        with suppress(Exception):  # of templates and tokenizers, in all kinds: said where the question is asked
            joined += joins_answer(processor, question.asked, question.answered)
    return {"joined_prompts": joined} if joined else {}
