"""Greedy answers of a vision-language model, compared with the right ones to the letter.

Each question goes through the model's own processor and chat template and through ``generate``. Questions about the
same image differ only behind the image, so the image is encoded once and the questions continue from a copy of its
key-value cache:

    image A   <s><|user|> <image> ... <image>     --- prefill, once per image --> keys and values
                         pad  What color ...? <|assistant|>   \\
                         pad  pad  Where is ...? <|assistant|>  >  generate, in one batch

The first answers are compared with those of ``generate`` without this shortcut. Should one differ (a model whose
positions or attention do not allow it), all questions go the plain way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from lvlm_prune.evaluation.scores import Question, Retention, Scores, retention
from lvlm_prune.processes import Processes

__all__ = ["Question", "Retention", "Scores", "answer", "retention", "score"]

#: Tokens that an answer may be longer than the longest right one of its batch: more cannot be an exact match.
_SPARE_TOKENS = 2
#: Questions whose answers are compared with and without a shared cache.
_CHECKED_QUESTIONS = 16


def score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int = 128,
    progress: Callable[[int], object] | None = None,
    processes: Processes | None = None,
) -> Scores:
    """Share of questions that the model answers to the letter, per task.

    Args:
        model: Model that generates; its device and dtype are kept.
        processor: Its processor, with a chat template.
        questions: What to ask.
        batch_size: Questions per batch.
        progress: Called after each batch with the number of questions that were answered in it, by all processes.
        processes: All processes that share the work; each of them calls this function and gets the same scores.

    Raises:
        ValueError: There are no questions, or `batch_size` is not positive.
    """
    if not questions:
        raise ValueError("`questions` is empty")
    answers = answer(model, processor, questions, batch_size, progress, processes)
    right: dict[str, list[bool]] = {}
    for question, given in zip(questions, answers):
        right.setdefault(question.task, []).append(given == question.answer)
    return Scores(
        tasks={task: sum(results) / len(results) for task, results in right.items()},
        counts={task: len(results) for task, results in right.items()},
        task_groups={question.task: question.group for question in questions},
    )


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
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
    by_image: dict[int, list[int]] = {}
    text_only = []
    for index, question in enumerate(questions):
        if question.image is None:
            text_only.append(index)
        else:
            by_image.setdefault(id(question.image), []).append(index)
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
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.sharing: bool | None = None  # not yet known

    def __call__(self, questions: list[Question]) -> list[str]:
        prompts = [self._prompt(question) for question in questions]
        right = self.tokenizer([f" {question.answer}" for question in questions], add_special_tokens=False).input_ids
        limit = max(map(len, right)) + 1 + _SPARE_TOKENS
        images = [question.image for question in questions]
        if images[0] is None or self.sharing is False or len({id(image) for image in images}) == len(images):
            return self._plain(prompts, images, limit)
        inputs = self._shared_inputs(prompts, images)
        answers = [] if inputs is None else self._generate(inputs, limit)
        if self.sharing is None:
            checked = self._plain(prompts[:_CHECKED_QUESTIONS], images[:_CHECKED_QUESTIONS], limit)
            self.sharing = answers[:_CHECKED_QUESTIONS] == checked
        return answers if self.sharing and answers else self._plain(prompts, images, limit)

    def _prompt(self, question: Question) -> str:
        content: list[dict[str, str]] = [{"type": "text", "text": question.question}]
        if question.image is not None:
            content.insert(0, {"type": "image"})
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _process(self, prompts: list[str], images: list[Any]) -> Any:
        """The processor's output, padded on the left; a beginning-of-sequence token in the template is not doubled."""
        begin = self.tokenizer.bos_token
        return self.processor(
            text=prompts,
            images=None if images[0] is None else [[image] for image in images],
            add_special_tokens=begin is None or not prompts[0].startswith(begin),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)

    def _plain(self, prompts: list[str], images: list[Any], limit: int) -> list[str]:
        return self._generate(self._process(prompts, images), limit)

    def _shared_inputs(self, prompts: list[str], images: list[Any]) -> dict[str, Any] | None:
        """Inputs of ``generate`` with the images' part already in the cache; None where prompts are not of that form.

        The processor runs on one prompt per image. For the others the image's placeholder is replaced by the tokens
        that it became there; that the same replacement gives the processor's own tokens is checked on each image.
        """
        position = {id(image): index for index, image in reversed(list(enumerate(images)))}
        first = sorted(position.values())  # index of the first question of each image
        owner = {id(images[index]): number for number, index in enumerate(first)}
        processed = self._process([prompts[index] for index in first], [images[index] for index in first])
        image_token = getattr(self.processor, "image_token_id", None)
        if set(processed) != {"input_ids", "attention_mask", "pixel_values"} or image_token is None:
            return None
        expanded = [ids[mask.bool()].tolist() for ids, mask in zip(processed["input_ids"], processed["attention_mask"])]
        rows: list[list[int]] = []
        for short, image in zip(self.tokenizer(prompts, add_special_tokens=False).input_ids, images):
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
        cache = self.model(input_ids=input_ids, pixel_values=processed["pixel_values"], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([owner[id(image)] for image in images], device=device))
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        tokens = [prefix + [self.tokenizer.pad_token_id] * n + row[shared:] for row, n in zip(rows, padding)]
        mask = [[1] * shared + [0] * n + [1] * (longest - shared - n) for n in padding]
        return {
            "input_ids": torch.tensor(tokens, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "past_key_values": cache,
        }

    def _generate(self, inputs: Any, limit: int) -> list[str]:
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=limit)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
