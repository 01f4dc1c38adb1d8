"""Training batches: many questions in one row, each seeing the image and itself but not the other questions.

    row with an image     <s><|user|> 144 x <image> | What ...? <|assistant|> red </s> | Is ...? <|assistant|> no </s> |
    segment                          0              |                1                 |               2               |
    row of text           <s><|user|> What is ...? <|assistant|> 7 </s> | <s><|user|> Sort ... | ...

Encoding the image once for a dozen questions is what makes training affordable. Position ids start again for each
segment, so that every question is seen exactly as it will be asked alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from lvlm_prune.demo.processing import ASSISTANT_ID, BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, USER_ID
from lvlm_prune.demo.questions import (
    TEXT_TASKS,
    VISION_TASKS,
    QuestionAnswer,
    caption,
    text_question,
    vision_questions,
)
from lvlm_prune.demo.splits import Split, random_for
from lvlm_prune.demo.world import PATCHES, draw_indexed

TASKS: tuple[str, ...] = (*VISION_TASKS, *TEXT_TASKS, "caption")
_IMAGE_PREFIX = [BOS_ID, USER_ID] + [IMAGE_ID] * PATCHES**2


@dataclass
class Segment:
    """Tokens of one question and its answer; ``groundings`` are (token index in the segment, cells)."""

    task: str
    prompt: list[int]
    answer: list[int]
    groundings: list[tuple[int, tuple[int, ...]]]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass
class Row:
    """One row of a training batch: an image's tokens, and the segments that follow it."""

    prefix: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.segments))


def encode(tokenizer: PreTrainedTokenizerFast, asked: Sequence[QuestionAnswer], prefix: list[int]) -> list[Segment]:
    """Tokenize questions and answers as the chat template would; ``prefix`` precedes the question in each segment."""
    backend = tokenizer.backend_tokenizer
    questions = backend.encode_batch([f" {qa.question}" for qa in asked])
    answers = backend.encode_batch_fast([f" {qa.answer}" for qa in asked])
    segments = []
    for qa, question, answer in zip(asked, questions, answers):
        groundings = []
        for grounding in qa.groundings:  # the text has gained a space in front
            token = max(index for index, (start, _) in enumerate(question.offsets) if start <= grounding.end)
            groundings.append((len(prefix) + token, grounding.cells))
        prompt = [*prefix, *question.ids, ASSISTANT_ID]
        segments.append(Segment(qa.task, prompt, [*answer.ids, EOS_ID], groundings))
    return segments


class PackedBatches(Dataset):
    """Item ``index`` is batch ``index``, a function of (split, seed, index).

    A batch is a dict; B rows (the first I of them with an image) of L tokens, G groundings:

    - ``pixels`` uint8 (I, 144, 144, 3); ``patch_labels`` int64 (I, 3, 12, 12)
    - ``input_ids``, ``position_ids``, ``segments`` int64 (B, L); segment 0 is the image, -1 is padding
    - ``labels`` int64 (B, L): the *next* token where it belongs to an answer, else -100; ``weights`` float32 (B, L)
    - ``tasks`` int64 (B, L): index into ``TASKS`` where there is a label, else -1
    - ``grounding_rows``, ``grounding_tokens`` int64 (G,); ``grounding_cells`` float32 (G, 9), 1 where they lie

    Args:
        tokenizer: Tokenizer of the embedded model.
        split: Which items may appear.
        seed: Everything random follows from it.
        batches: Length of the data set.
        image_rows: Rows with an image per batch (I).
        text_rows: Rows without an image per batch.
        row_length: Largest number of tokens per row.
        emphasis: Weight of a task in the choice of questions (1 where not given).
        caption_share: Share of image rows with a caption.
        caption_weight: Weight of a caption's tokens in the loss; tokens of other answers weigh 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        split: Split,
        seed: int,
        batches: int,
        image_rows: int,
        text_rows: int,
        row_length: int,
        emphasis: dict[str, float],
        caption_share: float = 0.15,
        caption_weight: float = 0.3,
    ) -> None:
        if unknown := set(emphasis) - {*VISION_TASKS, *TEXT_TASKS}:
            raise ValueError(f"`emphasis` names unknown tasks: {', '.join(sorted(unknown))}")
        self.tokenizer = tokenizer
        self.split, self.seed, self.batches = split, seed, batches
        self.image_rows, self.text_rows, self.row_length = image_rows, text_rows, row_length
        self.emphasis = emphasis
        self.caption_share, self.caption_weight = caption_share, caption_weight

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random_for("batch", self.split, self.seed, index)
        rows, images, patch_labels = [], [], []
        for row in range(self.image_rows):
            scene, image, labels = draw_indexed(self.split, self.seed, index * self.image_rows + row)
            images.append(np.asarray(image))
            patch_labels.append(labels)
            asked = [qa for _ in range(3) for qa in vision_questions(scene, rng)]
            asked = list({qa.question: qa for qa in asked}.values())
            asked.sort(key=lambda qa: rng.random() ** (1 / self.emphasis.get(qa.task, 1.0)), reverse=True)
            if rng.random() < self.caption_share:
                asked.insert(0, caption(scene, rng))
            rows.append(self._fill(Row(prefix=_IMAGE_PREFIX), encode(self.tokenizer, asked, prefix=[])))
        for _ in range(self.text_rows):
            weights = [self.emphasis.get(task, 1.0) for task in TEXT_TASKS]
            tasks = rng.choices(TEXT_TASKS, weights, k=self.row_length // 8)
            asked = [text_question(task, self.split, rng) for task in tasks]
            rows.append(self._fill(Row(), encode(self.tokenizer, asked, prefix=[BOS_ID, USER_ID])))
        return {
            "pixels": torch.from_numpy(np.stack(images)),
            "patch_labels": torch.from_numpy(np.stack(patch_labels)),
            **self._collate(rows),
        }

    def _fill(self, row: Row, segments: list[Segment]) -> Row:
        length = len(row)
        for segment in segments:
            if length + len(segment) > self.row_length:
                break
            row.segments.append(segment)
            length += len(segment)
        return row

    def _collate(self, rows: list[Row]) -> dict[str, Tensor]:
        shape = (len(rows), max(map(len, rows)))
        input_ids = np.full(shape, PAD_ID)
        labels, tasks, segments = np.full(shape, -100), np.full(shape, -1), np.full(shape, -1)
        position_ids, weights = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        groundings: list[tuple[int, int, tuple[int, ...]]] = []
        for index, row in enumerate(rows):
            start = len(row.prefix)
            input_ids[index, :start] = row.prefix
            position_ids[index, :start] = np.arange(start)
            segments[index, :start] = 0
            for number, segment in enumerate(row.segments, start=1):
                end = start + len(segment)
                answer = slice(start + len(segment.prompt) - 1, end - 1)
                input_ids[index, start:end] = segment.prompt + segment.answer
                position_ids[index, start:end] = len(row.prefix) + np.arange(len(segment))
                segments[index, start:end] = number
                labels[index, answer] = segment.answer
                tasks[index, answer] = TASKS.index(segment.task)
                weights[index, answer] = self.caption_weight if segment.task == "caption" else 1.0
                groundings += [(index, start + token, cells) for token, cells in segment.groundings]
                start = end
        cells = np.zeros((len(groundings), 9), dtype=np.float32)
        for number, (_, _, lying_in) in enumerate(groundings):
            cells[number, list(lying_in)] = 1.0
        arrays = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "segments": segments,
            "labels": labels,
            "tasks": tasks,
            "weights": weights,
            "grounding_rows": np.array([row for row, _, _ in groundings], dtype=np.int64),
            "grounding_tokens": np.array([token for _, token, _ in groundings], dtype=np.int64),
            "grounding_cells": cells,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def attention_mask(segments: Tensor) -> Tensor:
    """Additive mask (B, 1, L, L), bfloat16, from segment numbers (B, L): causal, own segment and the image only."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    return torch.where(seen & causal, 0.0, -1e4).to(torch.bfloat16)[:, None]
