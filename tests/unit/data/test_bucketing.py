"""Length bucketing: every sample once, little padding, the same order again after an interruption."""

import pytest
import torch

from lvlm_prune.data.bucketing import WINDOW, BucketedLoader

LENGTHS = [(7 * number) % 23 + 2 for number in range(150)]


def encode(number):
    """A sample whose tokens say its number; every third has an image of another kind."""
    ids = torch.full((1, LENGTHS[number]), number + 1)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    return inputs if number % 3 else inputs | {"pixel_values": torch.zeros(1, 3, 4, 4)}


def numbers(batch):
    return sorted(int(row[0]) - 1 for group in batch for row in group["input_ids"])


def loader(**options):
    return BucketedLoader(range(150), encode, **({"batch_size": 4, "seed": 0} | options))


def test_every_sample_exactly_once_in_as_many_batches_as_announced():
    batches = list(loader())
    assert len(batches) == len(loader()) == 38
    assert sorted(number for batch in batches for number in numbers(batch)) == list(range(150))


def test_samples_of_a_batch_are_about_equally_long():
    padded = sum((group["labels"] == -100).sum().item() for batch in loader() for group in batch)
    assert padded < 0.12 * sum(LENGTHS)


@pytest.mark.parametrize("position", [0, 1, WINDOW - 1, WINDOW, WINDOW + 3, 37])
def test_goes_on_behind_the_batches_that_were_handed_out(position):
    first = loader()
    first.set_epoch(2)
    whole = [numbers(batch) for batch in first]
    interrupted = loader()
    interrupted.set_epoch(2)
    seen = iter(interrupted)
    for _ in range(position):
        next(seen)
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    resumed.set_epoch(2)
    assert [numbers(batch) for batch in resumed] == whole[position:]
    resumed.set_epoch(3)
    assert len(list(resumed)) == 38


def test_another_epoch_and_another_seed_have_another_order():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        one = loader(seed=seed)
        one.set_epoch(epoch)
        orders.append([numbers(batch) for batch in one])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_processes_share_the_samples():
    shares = [{number for batch in loader(rank=rank, world_size=4) for number in numbers(batch)} for rank in range(4)]
    assert [len(share) for share in shares] == [37] * 4
    assert len(set.union(*shares)) == 148
