"""What a model says before the tokens of right answers, with each image forwarded once for all questions about it.

    image A   <s><|user|> <image> ... <image>   --- once per image --> keys and values
                         What color ...? <|assistant|> red </s>   pad  \\
                         Where is ...? <|assistant|> at the top </s>    > one forward, from copies of them

A causal model says behind an image what it would say without this shortcut, up to rounding. Whether it does is seen on
the first questions; where it does not (positions or attention that do not allow it), all go the plain way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvlm_prune.checkpoints.versions import cache_argument
from lvlm_prune.data.batches import Inputs
from lvlm_prune.data.labels import IGNORED, label_last_answer
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.data.processing import pad_token_of, refusals, render, tokenizer_of
from lvlm_prune.errors import RunError
from lvlm_prune.evaluation.scores import Question
from lvlm_prune.module import LVLMModule

Answer = tuple[int, Tensor, Tensor]
"""Number of a question; logits, float32 of shape (answer tokens, vocabulary); the answer tokens, int64."""

#: Inputs beside tokens that belong to the image alone, so that a forward that goes on behind it needs none of them.
_OF_THE_IMAGE = {"pixel_values", "image_sizes"}
#: Questions whose logits are compared with and without the shortcut.
_CHECKED_QUESTIONS = 8
#: Largest difference of logits that is rounding, over their standard deviation.
_ROUNDING = {torch.float32: 2e-3, torch.float64: 1e-6}
_ROUNDING_OF_HALF = 0.1


@dataclass(frozen=True)
class _Row:
    """A question: its tokens, what of them is the right answer, and where the image ends."""

    number: int
    ids: Tensor
    labels: Tensor
    shared: int


class SharedImages:
    """Answer logits of questions about the same images.

    Args:
        module: A whole model in memory.
        processor: Its processor.
        questions: All questions; they are called by their numbers.
        encoded: Number of a question to its model inputs with `labels`; runs the processor on the image.
        plain: Numbers of questions to their answers, without any shortcut.
    """

    def __init__(
        self,
        module: LVLMModule,
        processor: Any,
        questions: Sequence[Question],
        encoded: Callable[[int], Inputs],
        plain: Callable[[Sequence[int]], Iterator[Answer]],
    ) -> None:
        self.module, self.processor, self.questions = module, processor, questions
        self.encoded, self.plain = encoded, plain
        self.limits = ModelLimits.of(module.model)
        self.padding = self.limits.padding(pad_token_of(processor))
        self.image_token = getattr(processor, "image_token_id", None)
        self.exact: bool | None = None if self.image_token is not None else False

    def __call__(self, numbers: Sequence[int], batch_size: int) -> Iterator[Answer]:
        """Answers of some questions, in any order; those that share nothing go the plain way."""
        rest: list[int] = []
        for batch in self._batches(numbers, batch_size, rest):
            if self.exact is False:
                rest += batch
                continue
            found = self._shared(batch)
            if found is None:
                self.exact = bool(self.exact)
                rest += batch
            elif self.exact or self._is_exact(found):
                yield from found
            else:
                rest += batch
        if rest:
            yield from self.plain(rest)

    def _batches(self, numbers: Sequence[int], batch_size: int, rest: list[int]) -> list[list[int]]:
        """Questions about the same image together; those that are alone with theirs, or have none, go into `rest`."""
        by_image: dict[tuple[Hashable, ...], list[int]] = {}
        for number in numbers:
            question = self.questions[number]
            by_image.setdefault(question.image_keys or (number, "alone"), []).append(number)
        batches: list[list[int]] = []
        for keys, members in by_image.items():
            if len(keys) != 1 or len(members) == 1:
                rest += members
                continue
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                if batches and len(batches[-1]) + len(part) <= batch_size:
                    batches[-1] += part
                else:
                    batches.append(part)
        return batches

    def _is_exact(self, found: Sequence[Answer]) -> bool:
        """Whether the first answers are those of the plain way; known from then on."""
        checked = {number: logits for number, logits, _ in found[:_CHECKED_QUESTIONS]}
        tolerance = _ROUNDING.get(self.module.model.dtype, _ROUNDING_OF_HALF)
        self.exact = all(
            logits.shape == checked[number].shape
            and bool((logits - checked[number]).abs().max() <= tolerance * logits.std())
            for number, logits, _ in self.plain(list(checked))
        )
        return self.exact

    @torch.no_grad()
    def _shared(self, numbers: Sequence[int]) -> list[Answer] | None:
        """Answers behind images that are forwarded once; None where the questions are not of that form."""
        by_image: dict[Hashable, list[int]] = {}
        for number in numbers:
            by_image.setdefault(self.questions[number].image_keys, []).append(number)
        answers: list[Answer] = []
        together: dict[tuple[Hashable, ...], list[tuple[Inputs, list[_Row]]]] = {}
        for members in by_image.values():
            inputs = self.encoded(members[0])
            rows = self._rows(inputs, members)
            if rows is None:
                return None
            prefix = rows[0].ids[: rows[0].shared].tolist()
            shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items() if name in _OF_THE_IMAGE)
            together.setdefault((*prefix, *shapes), []).append((inputs, rows))
        for images in together.values():
            found = self._behind(images)
            if found is None:
                return None
            answers += found
        return answers

    def _rows(self, inputs: Inputs, numbers: Sequence[int]) -> list[_Row] | None:
        """Tokens of questions about the image of the first one, of which the processor made `inputs`.

        The others' text is tokenized, and the image's placeholder replaced by what it became there. That this gives the
        processor's own tokens is seen on the first one.
        """
        others = inputs.keys() - {"input_ids", "attention_mask", "labels"}
        first = inputs["input_ids"][0]
        places = [place for place, token in enumerate(first.tolist()) if token == self.image_token]
        if not others <= _OF_THE_IMAGE or not places or places[-1] - places[0] + 1 != len(places):
            return None
        rows = []
        for number in numbers:
            row = self._row(number, first, places)
            if row is None or (number == numbers[0] and not torch.equal(row.ids, first)):
                return None
            rows.append(row)
        return rows

    def _row(self, number: int, first: Tensor, places: Sequence[int]) -> _Row | None:
        """A question, with the image at its placeholder as in `first`, which begins alike; None where it does not."""
        tokenizer, sample = tokenizer_of(self.processor), self.questions[number].answered
        try:
            text = render(self.processor, sample.messages)
            starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
            with refusals(self.processor):
                short = tokenizer(text, add_special_tokens=not starts)["input_ids"]
            if short.count(self.image_token) != 1:
                return None
            place = short.index(self.image_token)
            ids = torch.tensor([*short[:place], *[self.image_token] * len(places), *short[place + 1 :]])
            self.limits.refuse({"input_ids": ids[None]})
            labels = label_last_answer(self.processor, sample, ids[None])[0]
        except (RunError, ValueError):  # the plain way refuses it too, and names it
            return None
        shared = place + len(places)
        is_answer = labels != IGNORED
        # What is said before the first answer token must be said behind the image.
        alike = torch.equal(ids[:shared], first[:shared]) and is_answer.any() and not is_answer[: shared + 1].any()
        return _Row(number, ids, labels, shared) if alike else None

    def _behind(self, images: Sequence[tuple[Inputs, Sequence[_Row]]]) -> list[Answer] | None:
        """Answers about images whose tokens up to their end are the same; None where the model gives no cache."""
        rows = [row for _, of in images for row in of]
        shared = rows[0].shared
        inputs = {"input_ids": rows[0].ids[:shared].expand(len(images), shared)}
        inputs |= {name: torch.cat([one[name] for one, _ in images]) for name in images[0][0] if name in _OF_THE_IMAGE}
        cache = _cache_of(self.module, self._there(inputs))
        owners = torch.tensor([number for number, (_, of) in enumerate(images) for _ in of], device=self.module.device)
        if not cache or not all(hasattr(held, "batch_select_indices") for held in cache.values()):
            return None
        for held in cache.values():
            held.batch_select_indices(owners)
        length = max(len(row.ids) for row in rows)
        group = {
            "input_ids": torch.stack([_filled(row.ids[shared:], length - shared, self.padding) for row in rows]),
            "attention_mask": torch.stack([_filled(torch.ones_like(row.ids), length, 0) for row in rows]),
            "labels": torch.stack([_filled(row.labels[shared:], length - shared, IGNORED) for row in rows]),
        }
        logits, tokens = self.module.answer_logits(self._there(group), cache)
        counts = (group["labels"] != IGNORED).sum(dim=1).tolist()
        numbers = [row.number for row in rows]
        return list(zip(numbers, logits.split(counts), tokens.split(counts), strict=True))

    def _there(self, inputs: Inputs) -> Inputs:
        return {name: value.to(self.module.device) for name, value in inputs.items()}


def _cache_of(module: LVLMModule, inputs: Inputs) -> dict[str, Any]:
    """Keys and values of tokens, as the argument by which the model takes them back; empty where it has none."""
    model = module.model
    arguments: dict[str, Any] = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    return cache_argument(model(**arguments, use_cache=True))


def _filled(values: Tensor, length: int, filling: int) -> Tensor:
    return pad(values, (0, length - len(values)), value=filling)
