"""Verification finds every kind of broken promise, and nothing to complain about where all are kept."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lvlm_prune.blocks import BlockRunner, StreamedWeights
from lvlm_prune.checkpoints import CheckpointFolder, build_skeleton
from lvlm_prune.errors import RunError
from lvlm_prune.methods.patterns import SemiStructured, Unstructured, ZeroCount
from lvlm_prune.output.verification import Expectation, refuse_other_findings, verify_checkpoint
from tests.conftest import MODEL

PRUNED = "layers.1.mlp.up_proj.weight"
OTHER = "layers.0.mlp.up_proj.weight"


class Checkpoints:
    """A dense checkpoint and one in which a single Linear is pruned by magnitude, half of each row."""

    def __init__(self, folder) -> None:
        self.dense, self.sparse = folder / "dense", folder / "sparse"
        for copy in (self.dense, self.sparse):
            shutil.copytree(MODEL, copy)
        checkpoint = CheckpointFolder(self.dense)
        runner = BlockRunner(build_skeleton(checkpoint))
        self.weights = StreamedWeights(runner.model, runner.decoder, checkpoint)
        self.linear = f"{runner.name(1)}.mlp.up_proj"
        self.mask = torch.zeros(0)

        def prune(weight: Tensor) -> Tensor:
            self.mask = Unstructured().mask(weight.abs(), 0.5)
            return weight.masked_fill(self.mask, 0.0)

        self.change(PRUNED, prune)
        rows = Unstructured().expected_zeros(tuple(self.mask.shape), 0.5)
        self.promise = Expectation(int(self.mask.sum()), [rows])

    def change(self, ending: str, change: Callable[[Tensor], Tensor], sparse: bool = True) -> None:
        """Write a changed tensor into the sparse (or dense) checkpoint."""
        path = (self.sparse if sparse else self.dense) / "model.safetensors"
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith(ending))
        tensors[key] = change(tensors[key].clone())
        save_file(tensors, path, {"format": "pt"})

    def verify(self, promise: Expectation | None = None) -> dict:
        dense, sparse = CheckpointFolder(self.dense), CheckpointFolder(self.sparse)
        return verify_checkpoint(dense, sparse, self.weights, {self.linear: promise or self.promise})


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path)


def put(row: int, column: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight[row, column] = value
        return weight

    return change


def test_kept_promises(checkpoints):
    found = checkpoints.verify()
    assert found["zeros"] == {checkpoints.linear: int(checkpoints.mask.sum())}
    assert found["sparsity"] == 0.5
    assert found["untouched_tensors"] == len(CheckpointFolder(checkpoints.dense)) - 1


def first(mask: Tensor) -> tuple[int, int]:
    row, column = mask.nonzero()[0].tolist()
    return row, column


def test_another_tensor_changed(checkpoints):
    checkpoints.change(OTHER, put(0, 0, 0.5))
    with pytest.raises(RunError, match=rf"tensor \S*{OTHER} was to stay"):
        checkpoints.verify()


def test_a_remaining_weight_changed(checkpoints):
    checkpoints.change(PRUNED, put(*first(~checkpoints.mask), 0.5))
    with pytest.raises(RunError, match=r"remaining weights of \S*layers.1.mlp.up_proj changed"):
        checkpoints.verify()


def test_a_pruned_weight_came_back(checkpoints):
    row, column = first(checkpoints.mask)
    dense = next(t for k, t in load_file(checkpoints.dense / "model.safetensors").items() if k.endswith(PRUNED))
    checkpoints.change(PRUNED, put(row, column, dense[row, column].item()))
    width = checkpoints.mask.shape[1]
    with pytest.raises(RunError, match=rf"has {width // 2 - 1} zeros in a group, {width // 2} were to be there"):
        checkpoints.verify()


def test_one_zero_too_many(checkpoints):
    checkpoints.change(PRUNED, put(*first(~checkpoints.mask), 0.0))
    with pytest.raises(RunError, match="zeros in a group"):
        checkpoints.verify()


def test_negative_zero(checkpoints):
    checkpoints.change(PRUNED, put(*first(checkpoints.mask), -0.0))
    with pytest.raises(RunError, match="changed"):
        checkpoints.verify()
    promise = Expectation(checkpoints.promise.pruned, checkpoints.promise.zeros, updated=True)
    with pytest.raises(RunError, match=r"holds -0\.0"):
        checkpoints.verify(promise)


def test_zeros_of_the_dense_weight_may_add_to_the_count(checkpoints):
    place = put(*first(~checkpoints.mask), 0.0)
    for sparse in (False, True):
        checkpoints.change(PRUNED, place, sparse)
    assert checkpoints.verify()["zeros"][checkpoints.linear] == int(checkpoints.mask.sum()) + 1


def test_an_updated_weight_may_change_but_not_lose_its_zeros(checkpoints):
    promise = Expectation(checkpoints.promise.pruned, checkpoints.promise.zeros, updated=True)
    checkpoints.change(PRUNED, lambda weight: weight * 1.5 + 0.0)
    checkpoints.verify(promise)
    checkpoints.change(PRUNED, put(*first(checkpoints.mask), 0.1))
    with pytest.raises(RunError, match="zeros in a group"):
        checkpoints.verify(promise)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_updated_weight_must_be_finite(value, checkpoints):
    checkpoints.change(PRUNED, put(*first(~checkpoints.mask), value))
    with pytest.raises(RunError, match="NaN or infinity"):
        checkpoints.verify(Expectation(checkpoints.promise.pruned, (), updated=True))


def test_the_total_is_held_where_nothing_else_is_promised(checkpoints):
    promise = Expectation(checkpoints.promise.pruned)
    checkpoints.verify(promise)
    checkpoints.change(PRUNED, put(*first(~checkpoints.mask), 0.0))
    with pytest.raises(RunError, match="zeros in all"):
        checkpoints.verify(promise)


def test_zeros_in_the_wrong_groups(checkpoints):
    """The right number in all, but not in every four columns."""
    shape = tuple(checkpoints.mask.shape)
    promise = Expectation(checkpoints.promise.pruned, [SemiStructured(2, 4).expected_zeros(shape, 0.5)])
    with pytest.raises(RunError, match="zeros in a group, 2 were to be there"):
        checkpoints.verify(promise)


def test_a_block_of_columns_with_too_few_zeros(checkpoints):
    columns = slice(0, 8)
    zeros = int(checkpoints.mask[:, columns].sum())
    rows = len(checkpoints.mask)
    checkpoints.verify(Expectation(checkpoints.promise.pruned, [ZeroCount(8 * rows, zeros, columns=columns)]))
    with pytest.raises(RunError, match=f"has {zeros} zeros in a group, {zeros + 1} were to be there"):
        checkpoints.verify(Expectation(checkpoints.promise.pruned, [ZeroCount(8 * rows, zeros + 1, columns=columns)]))


@pytest.mark.parametrize(
    ("recorded", "problem"),
    [
        ({"a": {"zeros": 3, "digest": "x"}}, ""),
        ({"a": {"zeros": 4, "digest": "x"}}, "a is not as it was written"),
        ({"a": {"zeros": 3, "digest": "y"}}, "a is not as it was written"),
        ({"a": {"digest": "x"}}, "does not say how a was written"),
        ({"a": {"zeros": 3}}, "does not say how a was written"),
        ({}, "does not say how a was written"),
    ],
)
def test_what_a_record_does_not_say_is_not_verified(recorded, problem):
    found = {"zeros": {"a": 3}, "digests": {"a": "x"}}
    with pytest.raises(RunError, match=problem) if problem else nullcontext():
        refuse_other_findings(recorded, found)
