"""The training set of recovery: the same sources as calibration, with labels, split, in batches.

data = RecoveryDataModule(LlavaJsonSource("instructions.json"), batch_size=8)
data.connect(processor, ModelLimits(vocabulary=32_000, context_length=4096))
trainer.fit(module, datamodule=data)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lvlm_prune.data.batches import Inputs, digest, fingerprint
from lvlm_prune.data.bucketing import BucketedLoader
from lvlm_prune.data.conversation import Conversation, Document
from lvlm_prune.data.embedded import EmbeddedQuestions
from lvlm_prune.data.labels import IGNORED, encode_with_labels
from lvlm_prune.data.limits import NO_LIMITS, ModelLimits
from lvlm_prune.data.processing import pad_token_of, refusals
from lvlm_prune.data.selection import choose
from lvlm_prune.data.source import CalibrationSource, sample_of
from lvlm_prune.errors import InputError, RunError, refuse_huge
from lvlm_prune.plugins import lazy_default, mounted, own_instance, plugin_class

Value = TypeVar("Value")

_SMALLEST_DEFAULT_VALIDATION, _LARGEST_DEFAULT_VALIDATION = 4, 128
_MOST_WORKERS = 1024

SAMPLE_NUMBER = "sample_number"
"""Entry of every sample beside its model inputs: its number in the source, int64 of shape (1,)."""


@dataclass
class Examination:
    """What going through all samples once has shown.

    Args:
        tokens: Tokens of all samples.
        longest: Tokens of the longest one.
        answers: Tokens that are to be learnt.
        fingerprint: SHA-256 of all samples, training before validation.
        sampled: SHA-256 of some of them, see `RecoveryDataModule.sampled`.
    """

    tokens: int
    longest: int
    answers: int
    fingerprint: str
    sampled: str


class RecoveryDataModule(L.LightningDataModule):
    """Samples with labels on the answer tokens, split into training and validation, in batches of similar length.

    Args:
        source: Where samples come from: conversations, documents, or ready-made inputs with a `labels` entry.
        num_samples: Samples to take, training and validation together. Default: all there are.
        validation_samples: How many of them are kept for validation. Default: every twentieth, of twenty and more at
            least 4, at most 128.
        seed: Another seed takes other samples, splits them otherwise and trains in another order.
        batch_size: Samples per step on each device.
        num_workers: Processes that encode samples; 0: the one that trains.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        source: CalibrationSource = lazy_default(EmbeddedQuestions),
        num_samples: int | None = None,
        validation_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("validation_samples", validation_samples, 0),
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"data.{name}", value, f"must be at least {least}")
            refuse_huge(f"data.{name}", value, most=_MOST_WORKERS if name == "num_workers" else None)
        self.source, self.num_samples = own_instance(source), num_samples
        self.validation_samples = validation_samples
        self.seed, self.batch_size, self.num_workers = seed, batch_size, num_workers
        self.train_indices: list[int] = []
        self.validation_indices: list[int] = []
        self._processor: Any = None
        self._limits = NO_LIMITS
        self._train_loader: BucketedLoader | None = None
        self._loader_state: dict[str, Any] | None = None

    def connect(self, processor: Any, limits: ModelLimits = NO_LIMITS) -> None:
        """Hand over what belongs to the model.

        Args:
            processor: From `load_processor`; None for sources of ready-made inputs.
            limits: What the model takes.
        """
        self._processor, self._limits = processor, limits

    def setup(self, stage: str | None = None) -> None:
        """Open the source, choose and split the samples, and check what can be checked without reading them all.

        Raises:
            InputError: The source cannot be read or holds too few samples, or a sample is visibly wrong.
        """
        if not self.train_indices:
            with mounted(data=self):
                self._choose()

    def _choose(self) -> None:
        self.source.setup()
        total = len(self.source)
        if self.num_samples is not None and self.num_samples > total:
            problem = f"the source holds only {total} sample{'' if total == 1 else 's'}"
            raise InputError("data.num_samples", self.num_samples, problem)
        selection = self.source.choose(self.num_samples or total, self.seed)
        count = self.validation_samples
        if count is None:
            few = _SMALLEST_DEFAULT_VALIDATION if len(selection) >= 20 else 0
            count = min(max(len(selection) // 20, few), _LARGEST_DEFAULT_VALIDATION)
        if count >= len(selection):
            problem = f"of {len(selection)} samples leaves none to train on"
            raise InputError("data.validation_samples", count, problem)
        validation = set(choose(count, len(selection), self.seed))
        self.validation_indices = [number for place, number in enumerate(selection) if place in validation]
        self.train_indices = [number for place, number in enumerate(selection) if place not in validation]
        self.source.verify(selection)

    def examine(self) -> Examination:
        """Go through all samples once, before anything is trained on them.

        Raises:
            InputError: A sample is broken, has no answer, or is nothing that the model takes.
        """
        found = list(self._examined([*self.train_indices, *self.validation_indices]))
        lengths, counts, digests = zip(*found)
        return Examination(sum(lengths), max(lengths), sum(counts), fingerprint(digests), fingerprint(_spread(digests)))

    def sampled(self) -> str:
        """SHA-256 of some samples from all over the data: tells other data apart without going through all.

        Raises:
            InputError: As `examine`, for these samples.
        """
        chosen = _spread([*self.train_indices, *self.validation_indices])
        return fingerprint(content for _, _, content in self._examined(chosen))

    def _examined(self, samples: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """Tokens, answer tokens and digest of each sample."""
        for found in DataLoader(_Examined(self, samples), batch_size=None, num_workers=self.num_workers):
            if isinstance(found, str):
                raise InputError("data.source", plugin_class(self.source).__name__, found)
            yield found

    def encode(self, number: int) -> Inputs:
        """Model inputs of a sample of the source, with `labels` and its number.

        Raises:
            RunError: The sample is broken, has no answer, or is nothing that the model takes.
        """
        name = f"sample {number}"
        try:
            sample = sample_of(self.source, number)
            name = getattr(sample, "id", "") or name
            self._refuse_unlabelled(sample)
            self._limits.refuse_media(self._processor, sample)
            inputs = self._encode(sample)
            self._limits.refuse(inputs)
            if not (inputs["labels"][:, 1:] != IGNORED).any():
                raise RunError("has no answer tokens: nothing could be learnt from it")
        except RunError as error:
            raise RunError(f"{getattr(error, 'id', '') or name}: {error}") from None
        return inputs | {SAMPLE_NUMBER: torch.tensor([number])}

    def _encode(self, sample: Any) -> Inputs:
        if not isinstance(sample, (Conversation, Document)):
            return dict(sample)
        with refusals(self._processor):
            return encode_with_labels(self._processor, sample)

    def _refuse_unlabelled(self, sample: Any) -> None:
        """Raise for a sample that says nowhere what is to be learnt."""
        if isinstance(sample, Conversation):
            roles = [message["role"] for message in sample.messages]
            if "assistant" not in roles:
                raise RunError("has no answer: no turn of the assistant to learn from")
            if roles[0] == "assistant":
                raise RunError("has no question: it begins with an answer")
        elif not isinstance(sample, Document):
            if "labels" not in sample:
                raise RunError("has no answer tokens: ready-made inputs need an entry `labels` (-100 where none is)")
            if sample["labels"].shape != sample["input_ids"].shape:
                shapes = f"{tuple(sample['labels'].shape)}, input_ids {tuple(sample['input_ids'].shape)}"
                raise RunError(f"has labels of shape {shapes}; they must agree")

    def train_dataloader(self) -> BucketedLoader:
        """Batches in an order of their own in each epoch; after `load_state_dict`, from where the state was taken."""
        self._train_loader = self._loader(self.train_indices, self.seed)
        if self._loader_state is not None:
            self._train_loader.load_state_dict(self._loader_state)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """How far the training samples are used up; Lightning keeps it in every checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self._loader_state = state_dict or None

    def val_dataloader(self) -> BucketedLoader | list[Any]:
        """Batches in the order of the source; empty without validation samples."""
        return self._loader(self.validation_indices, None) if self.validation_indices else []

    def batches(self, samples: Sequence[int]) -> BucketedLoader:
        """Batches of all of these samples, in about their order, on whichever process asks for them."""
        return self._loader(list(samples), None, alone=True)

    def _loader(self, samples: list[int], seed: int | None, alone: bool = False) -> BucketedLoader:
        trainer = None if alone else self.trainer
        pad_token_id = self._limits.padding(pad_token_of(self._processor)) if self._processor is not None else 0
        return BucketedLoader(
            samples,
            self.encode,
            self.batch_size,
            seed,
            pad_token_id,
            self.num_workers,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
        )


def _spread(values: Sequence[Value]) -> Sequence[Value]:
    """At least 64 of them, where there are as many, at equal distances."""
    return values[:: max(len(values) // 64, 1)]


class _Examined(Dataset):
    """(tokens, answer tokens, digest) of each sample, or what is wrong with it."""

    def __init__(self, data: RecoveryDataModule, samples: Sequence[int]) -> None:
        self.data, self.samples = data, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, int, str] | str:
        try:
            inputs = self.data.encode(self.samples[index])
        except RunError as error:
            return str(error)
        answers = int((inputs["labels"][:, 1:] != IGNORED).sum())
        return inputs["input_ids"].shape[1], answers, digest(inputs)
