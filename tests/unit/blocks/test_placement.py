"""Where samples wait changes nothing: not a bit of what comes out, not the layout of a tensor."""

import errno
import gc
import tempfile
from pathlib import Path

import pytest
import torch

from lvlm_prune.blocks import BlockRunner, CaughtBatch, Placement, place_batches
from lvlm_prune.blocks import placement as placement_module
from lvlm_prune.blocks.placement import WaitingElsewhere, relocate
from lvlm_prune.errors import RunError
from lvlm_prune.memory.hidden_states import HiddenStates
from tests.families import Sample, make_inputs, tiny_model
from tests.unit.blocks.test_decoder_kinds import INPUTS, KINDS, toy_model

# One whose decoder does nothing between blocks, one that does, one whose decoder skips blocks.
FAMILIES = ["llava", "qwen3_vl", "mllama"]


@pytest.fixture(autouse=True)
def _everything_moves(monkeypatch):
    """Tensors of tiny models would all be too small to be moved."""
    monkeypatch.setattr(placement_module, "_SMALLEST", 1)


def caught(family: str) -> tuple[BlockRunner, list[CaughtBatch]]:
    model = tiny_model(family)
    runner = BlockRunner(model)
    samples = [[Sample(3, 0, 5), Sample(2, 1, 9)], [Sample(4, None, 3)], [Sample(2, 0, 4)]]
    return runner, [runner.catch(make_inputs(family, model, one)) for one in samples]


def pass_through(runner: BlockRunner, batches: list[CaughtBatch], placement: Placement) -> list[torch.Tensor]:
    """As the loop does: a forward to gather and one to move on, at each block."""
    for index in range(len(runner)):
        gathered = [runner.run(index, here) for _, here in placement.stream(batches, index)]
        for (_, here), before in zip(placement.stream(batches, index), gathered):
            torch.testing.assert_close(runner.advance(index, here), before, rtol=0, atol=0)
    return [runner.finish(placement.fetched(batch)) for batch in batches]


def caught_by_toy(kind) -> tuple[BlockRunner, list[CaughtBatch]]:
    runner = BlockRunner(toy_model(kind))
    return runner, [runner.catch(inputs) for inputs in INPUTS]


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("model", [*FAMILIES, *KINDS])
def test_the_result_is_the_same_wherever_samples_wait(model, place, tmp_path):
    runner, batches = caught(model) if isinstance(model, str) else caught_by_toy(model)
    expected = pass_through(runner, [batch.fork() for batch in batches], Placement())
    placement = WaitingElsewhere(place, "cpu", tmp_path)
    for batch in batches:
        placement.hold(batch)
    forked = [batch.fork() for batch in batches]
    for _ in range(2):  # a fork, as a survey uses it, leaves what waits where it is
        for output, reference in zip(pass_through(runner, forked, placement), expected):
            torch.testing.assert_close(output, reference, rtol=0, atol=0)
        forked = batches
    placement.close()


def test_files_have_no_name_and_go_with_the_samples(tmp_path):
    runner, batches = caught("llava")
    placement = WaitingElsewhere("disk", "cpu", tmp_path)
    for batch in batches:
        placement.hold(batch)
    held = placement.peak_bytes
    assert held >= sum(batch.hidden.nbytes for batch in batches)
    assert list(tmp_path.iterdir()) == []
    pass_through(runner, batches, placement)
    gc.collect()
    largest = max(batch.nbytes for batch in batches)
    assert placement.peak_bytes <= held + 2 * largest  # old hidden states make room for new ones
    batches.clear()
    del batch
    placement.close()
    gc.collect()
    assert placement._bytes == 0


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    _, batches = caught("llava")
    placement = WaitingElsewhere("disk", "cpu", tmp_path)
    with pytest.raises(RunError, match=rf"--trainer.scratch {tmp_path}: .*No space left on device") as error:
        placement.hold(batches[0])
    assert "\n" not in str(error.value)
    placement.close()


def test_layout_and_shared_memory_stay():
    base = torch.arange(4096.0)
    tensors = [base[100:1000].view(30, 30).T, base[:64].expand(8, 64), base[200:300], torch.zeros(0), torch.ones(3)]
    spans = []

    def move(span):
        spans.append(span)
        return span.clone()

    moved = relocate(tensors, move)
    assert len(spans) == 2  # what is shared moves once, and of a large storage only the part in use
    assert len(spans[0]) == 4000
    for tensor in tensors[:3]:
        copy = moved[id(tensor)]
        assert copy.stride() == tensor.stride()
        assert torch.equal(copy, tensor)
    moved[id(tensors[2])].zero_()
    assert (moved[id(tensors[0])].T.flatten()[100:200] == 0).all()
    assert base.sum() == torch.arange(4096.0).sum()


def test_auto_goes_to_files_once_host_memory_is_half_full(tmp_path):
    runner, batches = caught("llava")
    expected = pass_through(runner, [batch.fork() for batch in batches], Placement())
    held = HiddenStates("auto", torch.device("cpu"), tmp_path, catching=batches[0].nbytes + 1)
    held.add(batches[0])
    assert held.placement.place == "device"
    held.add(batches[1])
    assert held.placement.place == "disk"
    held.add(batches[2])
    held.settle("device")
    assert held.placement.place == "disk"  # what lies in files stays there
    for output, reference in zip(pass_through(runner, batches, held.placement), expected):
        torch.testing.assert_close(output, reference, rtol=0, atol=0)
    held.placement.close()


def test_auto_settles_when_sizes_are_known(tmp_path):
    _, batches = caught("llava")
    held = HiddenStates("auto", torch.device("cpu"), tmp_path, catching=10**9)
    for batch in batches:
        held.add(batch)
    held.settle("disk")
    assert held.placement.place == "disk"
    assert held.placement.peak_bytes > 0
    held.placement.close()


def test_host_memory_is_the_device_of_a_cpu(tmp_path):
    assert place_batches("host", "cpu", Path(tmp_path)).place == "device"
