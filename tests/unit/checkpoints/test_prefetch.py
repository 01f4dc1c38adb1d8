"""The next block is read while this one is in work, and is the same as without that."""

from pathlib import Path

import pytest
import torch

from lvlm_prune.blocks import BlockRunner, StreamedWeights
from lvlm_prune.checkpoints import CheckpointFolder, build_skeleton
from lvlm_prune.errors import RunError
from tests.families import tiny_model


@pytest.fixture
def streamed(tmp_path: Path) -> tuple[BlockRunner, StreamedWeights, CheckpointFolder]:
    tiny_model("qwen3_omni_moe").save_pretrained(tmp_path)  # with stacks of experts, which are converted
    checkpoint = CheckpointFolder(tmp_path)
    runner = BlockRunner(build_skeleton(checkpoint))
    return runner, StreamedWeights(runner.model, runner.decoder, checkpoint), checkpoint


def contents(runner: BlockRunner, i: int) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in runner.block(i).named_parameters()}


def test_a_prefetched_block_is_the_block(streamed):
    runner, weights, _ = streamed
    weights.load_block(1)
    expected = contents(runner, 1)
    weights.release_block(1)
    weights.prefetch_block(1)
    weights.load_block(0)  # another one in between: what was read for nothing is dropped
    weights.prefetch_block(1)
    weights.load_block(1)
    for name, tensor in contents(runner, 1).items():
        assert torch.equal(tensor, expected[name]), name


def test_it_is_read_before_it_is_loaded(streamed, monkeypatch):
    runner, weights, checkpoint = streamed
    weights.prefetch_block(2)
    weights._coming[1].take()
    monkeypatch.setattr(checkpoint, "read", None)  # nothing is read any more
    weights.load_block(2)
    assert all(parameter.device.type == "cpu" for parameter in runner.block(2).parameters())


def test_another_folder_is_never_served_from_what_was_prefetched(streamed, tmp_path):
    _, weights, checkpoint = streamed
    weights.prefetch_block(1)
    read = []
    other = checkpoint.at(checkpoint.path)
    other.read = lambda key, *rest: read.append(key) or checkpoint.read(key, *rest)
    weights.load_block(1, other)
    assert read


def test_what_goes_wrong_is_said_when_the_block_is_loaded(streamed):
    _, weights, checkpoint = streamed
    for shard in checkpoint.shards:
        with open(checkpoint.path / shard, "r+b") as file:
            file.truncate(2000)
    weights.prefetch_block(0)
    with pytest.raises(RunError, match="was changed while it was in use"):
        weights.load_block(0)
