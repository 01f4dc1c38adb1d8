"""Greedy answers of a vision-language model, and how many of them are right.

Each question goes through the model's own processor and chat template and through ``generate``. Questions about the
same image differ only behind the image, so the image is encoded once and the questions continue from a copy of its
key-value cache:

    image A   <s><|user|> <image> ... <image>     --- prefill, once per image --> keys and values
                         pad  What color ...? <|assistant|>   \\
                         pad  pad  Where is ...? <|assistant|>  >  generate, in one batch

The first answers are compared with those of ``generate`` without this shortcut. Should one differ (a model whose
positions or attention do not allow it), all questions go the plain way.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_prune.checkpoints.versions import cache_argument
from lvlm_prune.data.conversation import Conversation, load_image
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.data.processing import encode, pad_token_of, refusals, render, tokenizer_of
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import RunError, first_line, one_line
from lvlm_prune.evaluation.metrics import METRICS
from lvlm_prune.evaluation.scores import Question, Retention, Scores, retention

__all__ = ["Question", "Retention", "Scores", "answer", "retention", "score"]

#: Tokens that an answer may be longer than the longest right one of its batch: more cannot make it right.
_SPARE_TOKENS = 2
#: Questions whose answers are compared with and without a shared cache.
_CHECKED_QUESTIONS = 16


def score(
    model: PreTrainedModel,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int = 128,
    progress: Callable[[int], object] | None = None,
    processes: Processes | None = None,
) -> Scores:
    """Share of questions that the model answers rightly, per task.

    Args:
        model: Model that generates; its device and dtype are kept.
        processor: Its processor, or the tokenizer of a model that takes only text.
        questions: Questions with their right answers and tasks.
        batch_size: Questions per batch.
        progress: Called after each batch with the number of questions that were answered in it, by all processes.
        processes: All processes that share the work; each of them calls this function and gets the same scores.

    Raises:
        ValueError: There are no questions, or `batch_size` is not positive.
    """
    if not questions:
        raise ValueError("`questions` is empty")
    answers = answer(model, processor, questions, batch_size, progress, processes)
    by_task: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_task.setdefault(question.task, []).append(index)
    accuracies, metrics = {}, {}
    for task, indices in by_task.items():
        metrics[task] = questions[indices[0]].metric
        # Every process has all answers.
        accuracy = METRICS[metrics[task]](sync_on_compute=False)
        accuracy.update([answers[index] for index in indices], [questions[index].answer for index in indices])
        accuracies[task] = accuracy.compute().item()
    return Scores(
        tasks=accuracies,
        counts={task: len(indices) for task, indices in by_task.items()},
        task_groups={question.task: question.group for question in questions},
        metrics=dict(metrics),
    )


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int = 128,
    progress: Callable[[int], object] | None = None,
    processes: Processes | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of the questions; arguments as for :func:`score`."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}")
    was_training = model.training
    model.eval()
    answerer = _Answerer(model, processor)
    processes = processes or Processes()
    answers: dict[int, str] = {}
    # Whole batches are dealt out, so the answers do not depend on the number of processes.
    batches = _batches(questions, batch_size)
    for start in range(0, len(batches), processes.count):
        for batch in batches[start + processes.rank : start + processes.rank + 1]:
            answers.update(zip(batch, answerer([questions[index] for index in batch])))
        if progress is not None:
            progress(sum(map(len, batches[start : start + processes.count])))
    model.train(was_training)
    everywhere = {index: given for part in processes.gather(answers) for index, given in part.items()}
    return [everywhere[index] for index in range(len(questions))]


def _batches(questions: Sequence[Question], batch_size: int) -> list[list[int]]:
    """Indices in batches: by image where there is one, else by length, so that little is padded and few wait."""
    by_image: dict[tuple[Hashable, ...], list[int]] = {}
    text_only = []
    for index, question in enumerate(questions):
        if question.image_keys:
            by_image.setdefault(question.image_keys, []).append(index)
        else:
            text_only.append(index)
    text_only.sort(key=lambda index: (questions[index].task, len(questions[index].question)))
    batches = [text_only[start : start + batch_size] for start in range(0, len(text_only), batch_size)]
    batch: list[int] = []
    for indices in by_image.values():
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            if len(batch) + len(part) > batch_size:
                batches.append(batch)
                batch = []
            batch = batch + part
    return [*batches, batch] if batch else batches


class _Answerer:
    """Answers batches; remembers whether sharing an image's cache was found to be exact for this model."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer_of(processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.limits = ModelLimits.of(model)
        self.padding = self.limits.padding(pad_token_of(processor))
        self.sharing: bool | None = None  # not yet known

    def __call__(self, questions: list[Question]) -> list[str]:
        asked = [question.asked for question in questions]
        prompts = []
        for question, one in zip(questions, asked, strict=True):
            with self._refusals(question.question):
                self.limits.refuse_media(self.processor, one)
                prompts.append(render(self.processor, one.messages, add_generation_prompt=True))
        right = self.tokenizer([f" {question.answer}" for question in questions], add_special_tokens=False).input_ids
        limit = max(map(len, right)) + 1 + _SPARE_TOKENS
        if any(one.videos or one.audios for one in asked):
            return [self._alone(one, prompt, limit) for one, prompt in zip(asked, prompts, strict=True)]
        keys = [question.image_keys for question in questions]
        images = _opened(asked, keys)
        if self.sharing is False or any(len(key) != 1 for key in keys) or len(set(keys)) == len(keys):
            return self._plain(prompts, images, limit)
        inputs = self._shared_inputs(prompts, images, limit)
        answers = [] if inputs is None else self._generate(inputs, limit)
        if self.sharing is None:
            checked = self._plain(prompts[:_CHECKED_QUESTIONS], images[:_CHECKED_QUESTIONS], limit)
            self.sharing = answers[:_CHECKED_QUESTIONS] == checked
        return answers if self.sharing and answers else self._plain(prompts, images, limit)

    def _process(self, prompts: list[str], images: list[list[Any]], limit: int) -> dict[str, Tensor]:
        """The processor's output, padded on the left; a beginning-of-sequence token in the template is not doubled.

        Raises:
            RunError: The processor refuses the questions, or the model has no room for answers of `limit` tokens.
        """
        begin = self.tokenizer.bos_token
        arguments: dict[str, Any] = {"images": images} if images[0] else {}
        with self._refusals(prompts[0]):
            processed = self.processor(
                text=prompts,
                add_special_tokens=begin is None or not prompts[0].startswith(begin),
                padding=True,
                padding_side="left",
                return_tensors="pt",
                truncation=False,
                **arguments,
            )
            self._fit(processed, limit)
        return self._placed(processed)

    def _alone(self, asked: Conversation, prompt: str, limit: int) -> str:
        """The answer to one question about videos or sounds."""
        with self._refusals(prompt):
            inputs = encode(self.processor, asked, add_generation_prompt=True)
            self._fit(inputs, limit)
        return self._generate(self._placed(inputs), limit)[0]

    @contextmanager
    def _refusals(self, prompt: str) -> Iterator[None]:
        """What the processor or the model does not take becomes one line that names the (first) question.

        Raises:
            RunError: It does not take it.
        """
        try:
            with refusals(self.processor):
                yield
        except RunError as error:
            raise RunError(f"the question '... {one_line(prompt)[-80:]}' or one in its batch: {error}") from error

    def _fit(self, inputs: dict[str, Tensor], limit: int) -> None:
        """Refuse what the model does not take, with an answer of `limit` tokens; pad with a token that it has."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        ids.masked_fill_(~mask, self.padding)
        replace(self.limits, context_length=None).refuse(inputs)
        self.limits.refuse({"input_ids": ids.new_zeros(1, int(mask.sum(dim=1).max()) + limit)})

    def _placed(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors where the model is, in its precision."""
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def _plain(self, prompts: list[str], images: list[list[Any]], limit: int) -> list[str]:
        return self._generate(self._process(prompts, images, limit), limit)

    def _shared_inputs(self, prompts: list[str], images: list[list[Any]], limit: int) -> dict[str, Any] | None:
        """Inputs of ``generate`` with the images' part already in the cache; None where prompts are not of that form.

        The processor runs on one prompt per image. For the others the image's placeholder is replaced by the tokens
        that it became there; that the same replacement gives the processor's own tokens is checked on each image.
        """
        position = {id(image): index for index, (image,) in reversed(list(enumerate(images)))}
        first = sorted(position.values())  # index of the first question of each image
        owner = {id(images[index][0]): number for number, index in enumerate(first)}
        processed = self._process([prompts[index] for index in first], [images[index] for index in first], limit)
        image_token = getattr(self.processor, "image_token_id", None)
        if set(processed) != {"input_ids", "attention_mask", "pixel_values"} or image_token is None:
            return None
        expanded = [ids[mask.bool()].tolist() for ids, mask in zip(processed["input_ids"], processed["attention_mask"])]
        rows: list[list[int]] = []
        for short, (image,) in zip(self.tokenizer(prompts, add_special_tokens=False).input_ids, images):
            if short.count(image_token) != 1:
                return None
            start, count = short.index(image_token), expanded[owner[id(image)]].count(image_token)
            rows.append([*short[:start], *[image_token] * count, *short[start + 1 :]])
        shared = len(rows[0]) - rows[0][::-1].index(image_token)
        prefix = rows[0][:shared]
        if any(rows[index] != expanded[number] for number, index in enumerate(first)):
            return None
        if any(row[:shared] != prefix or image_token in row[shared:] for row in rows):
            return None
        device = self.model.device
        input_ids = torch.tensor([prefix] * len(first), device=device)
        output = self.model(input_ids=input_ids, pixel_values=processed["pixel_values"], use_cache=True)
        if not (cache := cache_argument(output)):
            return None
        for held in cache.values():
            held.batch_select_indices(torch.tensor([owner[id(image)] for (image,) in images], device=device))
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        tokens = [prefix + [self.padding] * n + row[shared:] for row, n in zip(rows, padding)]
        mask = [[1] * shared + [0] * n + [1] * (longest - shared - n) for n in padding]
        made = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        with self._refusals(prompts[0]):
            self._fit(made, limit)
        return {**self._placed(made), **cache}

    def _generate(self, inputs: Any, limit: int) -> list[str]:
        # Greedily, whatever was saved with the checkpoint.
        greedy = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        try:
            tokens = self.model.generate(**inputs, **greedy, max_new_tokens=limit, pad_token_id=self.padding)
        except (TypeError, ValueError) as error:
            raise RunError(f"the model cannot answer with its generation_config.json: {first_line(error)}") from error
        except (LookupError, ArithmeticError, AttributeError) as error:
            raise RunError(f"the model cannot answer: {first_line(error)}") from error
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _opened(asked: Sequence[Conversation], keys: Sequence[tuple[Hashable, ...]]) -> list[list[Any]]:
    """Images of each question, equal ones as one object.

    Raises:
        RunError: A file is missing or is not an image.
    """
    opened: dict[Hashable, Any] = {}
    for one, names in zip(asked, keys, strict=True):
        for name, image in zip(names, one.images, strict=True):
            if name not in opened:
                opened[name] = load_image(image)
    return [[opened[name] for name in names] for names in keys]
