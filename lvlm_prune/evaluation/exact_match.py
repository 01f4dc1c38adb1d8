"""Greedy answers of a vision-language model, compared with the right ones to the letter.

Each question goes through the model's own processor and chat template and through ``generate``. Questions about the
same image differ only behind the image, so the image is encoded once and the questions continue from a copy of its
key-value cache:

    image A   <s><|user|> <image> ... <image>     --- prefill, once per image --> keys and values
                         pad  What color ...? <|assistant|>   \\
                         pad  pad  Where is ...? <|assistant|>  >  generate, in one batch

On the first batch the answers are compared with those of ``generate`` without this shortcut. Should one differ (a model
whose positions or attention do not allow it), all questions go the plain way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from lvlm_prune.evaluation.scores import Question, Retention, Scores, retention

__all__ = ["Question", "Retention", "Scores", "answer", "retention", "score"]

#: Tokens that an answer may be longer than the longest right one of its batch: more cannot be an exact match.
_SPARE_TOKENS = 2


def score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Share of questions that the model answers to the letter, per task.

    Args:
        model: Model that generates; its device and dtype are kept.
        processor: Its processor, with a chat template.
        questions: What to ask.
        batch_size: Questions per batch.
        progress: Called after each batch with the number of questions answered so far.

    Raises:
        ValueError: There are no questions, or `batch_size` is not positive.
    """
    if not questions:
        raise ValueError("`questions` is empty")
    answers = answer(model, processor, questions, batch_size, progress)
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
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of the questions; arguments as for :func:`score`."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}")
    was_training = model.training
    model.eval()
    answerer = _Answerer(model, processor)
    answers: list[str] = [""] * len(questions)
    done = 0
    for batch in _batches(questions, batch_size):
        for index, given in zip(batch, answerer([questions[index] for index in batch])):
            answers[index] = given
        done += len(batch)
        if progress is not None:
            progress(done)
    model.train(was_training)
    return answers


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
        longest = max(
            len(self.tokenizer(f" {question.answer}", add_special_tokens=False).input_ids) for question in questions
        )
        limit = longest + 1 + _SPARE_TOKENS
        images = [question.image for question in questions]
        if images[0] is None or self.sharing is False or len({id(image) for image in images}) == len(images):
            return self._plain(prompts, images, limit)
        answers = self._shared(prompts, images, limit)
        if self.sharing is None:
            self.sharing = answers is not None and answers == self._plain(prompts, images, limit)
        return answers if self.sharing and answers is not None else self._plain(prompts, images, limit)

    def _prompt(self, question: Question) -> str:
        content: list[dict[str, str]] = [{"type": "text", "text": question.question}]
        if question.image is not None:
            content.insert(0, {"type": "image"})
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _plain(self, prompts: list[str], images: list[Any], limit: int) -> list[str]:
        pictures = {"images": [[image] for image in images]} if images[0] is not None else {}
        inputs = self.processor(text=prompts, **pictures, padding=True, padding_side="left", return_tensors="pt")
        return self._generate(inputs, limit)

    def _shared(self, prompts: list[str], images: list[Any], limit: int) -> list[str] | None:
        """Answers by way of one prefill per image; None where prompts do not have the form that this needs."""
        unique = list({id(image): index for index, image in reversed(list(enumerate(images)))}.values())[::-1]
        owner = {id(images[index]): number for number, index in enumerate(unique)}
        first = self.processor(
            text=[prompts[index] for index in unique], images=[[images[index]] for index in unique], padding=False
        )
        image_token = self.processor.image_token_id
        rows: list[list[int]] = []
        for prompt, image in zip(prompts, images):
            short = self.tokenizer(prompt, add_special_tokens=False).input_ids
            expanded = list(first["input_ids"][owner[id(image)]])
            if short.count(image_token) != 1:
                return None
            start, count = short.index(image_token), expanded.count(image_token)
            rows.append([*short[:start], *[image_token] * count, *short[start + 1 :]])
        if any(rows[index] != list(first["input_ids"][owner[id(images[index])]]) for index in unique):
            return None
        shared = min(len(row) - 1 - row[::-1].index(image_token) for row in rows) + 1
        if any(row[:shared] != rows[0][:shared] or image_token in row[shared:] for row in rows):
            return None
        device = self.model.device
        extra = {
            name: torch.as_tensor(value)
            if not isinstance(value, list)
            else torch.stack([torch.as_tensor(v) for v in value])
            for name, value in first.items()
            if name not in ("input_ids", "attention_mask")
        }
        prefix = torch.tensor([rows[index][:shared] for index in unique], device=device)
        extra = {
            name: value.to(device, self.model.dtype if value.is_floating_point() else None)
            for name, value in extra.items()
        }
        cache = self.model(
            input_ids=prefix, attention_mask=torch.ones_like(prefix), use_cache=True, logits_to_keep=1, **extra
        ).past_key_values
        cache.batch_select_indices(torch.tensor([owner[id(image)] for image in images], device=device))
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor(
            [row[:shared] + [pad] * n + row[shared:] for row, n in zip(rows, padding)], device=device
        )
        attention_mask = torch.ones_like(input_ids)
        for row, n in enumerate(padding):
            attention_mask[row, shared : shared + n] = 0
        return self._generate(
            {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache}, limit
        )

    def _generate(self, inputs: Any, limit: int) -> list[str]:
        if hasattr(inputs, "to"):
            inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=limit)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
