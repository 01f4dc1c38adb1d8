"""Length bucketing: batches of samples of about equal length, in an order that can be taken up again anywhere.

epoch    a permutation of all samples, from the seed and the number of the epoch
window   the next `WINDOW` batches of it: encoded, sorted by kind and length, cut into batches, shuffled
batch    groups of samples that can be stacked without padding anything but tokens; mostly one group
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lvlm_prune.data.batches import Inputs, batch_key, collate
from lvlm_prune.seeds import combined_seed

WINDOW = 16

Batch = list[Inputs]
"""Groups of samples, each as model inputs."""


class BucketedLoader:
    """An iterable of batches for `Trainer.fit`; with its state a killed run goes on with the very next batch.

    Args:
        samples: Numbers of the samples.
        encode: Model inputs of the sample of a number.
        batch_size: Samples per batch on this process.
        seed: Seed of the order; None keeps the order of `samples`.
        pad_token_id: Fills up shorter samples of a batch.
        num_workers: Processes that encode; 0: this one.
        rank: Number of this process.
        world_size: Number of processes; samples that cannot be dealt out evenly are left out of an epoch.

    Example:
        >>> def encode(number):
        ...     return {"input_ids": torch.full((1, number), number)}
        >>> loader = BucketedLoader([3, 1, 2, 4], encode, batch_size=2, seed=None)
        >>> [batch[0]["input_ids"].tolist() for batch in loader]
        [[[1, 0], [2, 2]], [[3, 3, 3, 0], [4, 4, 4, 4]]]
    """

    def __init__(
        self,
        samples: Sequence[int],
        encode: Callable[[int], Inputs],
        batch_size: int,
        seed: int | None,
        pad_token_id: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples, self.encode, self.batch_size, self.seed = list(samples), encode, batch_size, seed
        self.pad_token_id, self.num_workers = pad_token_id, num_workers
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0
        self._restored: tuple[int, int] | None = None

    batch_sampler = None  # Lightning asks every loader that has a `sampler`

    @property
    def sampler(self) -> BucketedLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """The number of the epoch, and of batches of it that were handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the epoch of the state behind the batches that were handed out."""
        self._restored = (state_dict["epoch"], state_dict["position"])

    def __len__(self) -> int:
        return -(-self._share() // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        if self._restored is not None:
            epoch, position = self._restored
            start = position if epoch == self.epoch and position < len(self) else 0
            self._restored = None
        self.position = start
        order = self._order()
        per_window = WINDOW * self.batch_size
        first_window, skipped = divmod(start, WINDOW)
        encoded = DataLoader(
            _Encoded(order[first_window * per_window :], self.encode),
            batch_size=per_window,
            num_workers=self.num_workers,
            collate_fn=list,
        )
        for number, window in enumerate(encoded, first_window):
            for batch in self._batches(window, number)[skipped:]:
                self.position += 1
                yield batch
            skipped = 0

    def _share(self) -> int:
        return len(self.samples) // self.world_size if self.world_size > 1 else len(self.samples)

    def _order(self) -> list[int]:
        order = self.samples
        if self.seed is not None:
            order = [order[index] for index in torch.randperm(len(order), generator=self._generator(self.epoch))]
        return order[self.rank :: self.world_size][: self._share()]

    def _batches(self, window: list[Inputs], number: int) -> list[Batch]:
        def kind(inputs: Inputs) -> str:
            return repr(batch_key(inputs))

        window = sorted(window, key=lambda inputs: (kind(inputs), inputs["input_ids"].shape[1]))
        runs = [window[start : start + self.batch_size] for start in range(0, len(window), self.batch_size)]
        batches = [[collate(list(group), self.pad_token_id) for _, group in groupby(run, key=kind)] for run in runs]
        if self.seed is None:
            return batches
        generator = self._generator(self.epoch, number + 1)
        return [batches[index] for index in torch.randperm(len(batches), generator=generator)]

    def _generator(self, *numbers: int) -> torch.Generator:
        counted = (number + 1 for number in numbers)
        return torch.Generator().manual_seed(combined_seed(self.seed or 0, *counted, modulus=2**62))


class _Encoded(Dataset):
    def __init__(self, order: list[int], encode: Callable[[int], Inputs]) -> None:
        self.order, self.encode = order, encode

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Inputs:
        return self.encode(self.order[index])
