"""Packing loses nothing, and what does not belong together is refused."""

import pytest
import torch

from lvlm_prune.packed.kernels import PackedMatrix, pack_rows, unpack_rows
from tests.unit.packed.kernels.matrices import DTYPES, SHAPES, same_bits, sparse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_back_every_bit(kernels, dtype, shape):
    for sparsity in (0.0, 0.5, 0.97, 1.0):
        dense = sparse(*shape, sparsity, dtype)
        values, mask = pack_rows(dense)
        assert values.shape == (int((dense != 0).sum()),)
        assert mask.shape == (shape[0], -(-shape[1] // 8))
        assert same_bits(unpack_rows(values, mask, shape[1]), dense)
        matrix = PackedMatrix.from_bitmask(values, mask, shape)
        assert same_bits(matrix.to_dense(), dense)
        assert all(same_bits(ours, theirs) for ours, theirs in zip(matrix.to_bitmask(), (values, mask)))


def test_the_mask_is_what_numpy_packs(kernels):
    np = pytest.importorskip("numpy")
    dense = sparse(5, 77, 0.5, torch.float32)
    _, mask = pack_rows(dense)
    assert np.array_equal(mask.numpy(), np.packbits((dense != 0).numpy(), axis=1, bitorder="little"))


@pytest.mark.parametrize("special", [-0.0, float("inf"), float("-inf"), float("nan"), 1e-45])
def test_special_values_survive(kernels, special):
    dense = torch.zeros(3, 70)
    dense[1, 65] = special
    assert same_bits(PackedMatrix.from_dense(dense).to_dense(), dense)


def pieces():
    dense = sparse(9, 70, 0.5, torch.bfloat16)
    return *pack_rows(dense), (9, 70)


def test_pieces_that_do_not_belong_together_are_refused(kernels):
    values, mask, shape = pieces()
    past = mask.clone()
    past[4, -1] |= 0b1000000
    flipped = mask.clone()
    flipped[0, 0] ^= 1
    for bad, problem in [
        ((values[:-1], mask, shape), "`values` has"),
        ((torch.cat([values, values[:1]]), mask, shape), "`values` has"),
        ((values, flipped, shape), "`values` has"),
        ((values, mask[:-1], shape), "`mask` is"),
        ((values, mask[:, :-1], shape), "`mask` is"),
        ((values, mask.int(), shape), "`mask` is"),
        ((values, mask, (9, 2**40)), "`mask` is"),
        ((values, mask, (2**40, 70)), "`mask` is"),
        ((values, past, shape), "past the last"),
        ((values[None], mask, shape), "`values` is"),
        ((values.double(), mask, shape), "`values` is"),
        ((values, mask, (0, 70)), "`shape` is"),
        ((values, mask, (9, -70)), "`shape` is"),
    ]:
        with pytest.raises(ValueError, match=problem):
            PackedMatrix.from_bitmask(*bad)


def test_unpacking_checks_what_it_is_given(kernels):
    values, mask, (_, columns) = pieces()
    with pytest.raises(ValueError, match="`values` has"):
        unpack_rows(values[:-1], mask, columns)


@pytest.mark.parametrize(("sparsity", "smaller"), [(0.5, 1.75), (0.6, 2.1), (0.7, 2.65)])
def test_memory_is_that_of_the_values_and_a_bit_per_weight(kernels, sparsity, smaller):
    dense = sparse(512, 1024, sparsity, torch.bfloat16)
    assert dense.nbytes / PackedMatrix.from_dense(dense).nbytes > smaller


@pytest.mark.parametrize("dense", [torch.zeros(3, 4).double(), torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 3, 4)])
def test_other_tensors_are_not_packed(dense):
    with pytest.raises(ValueError, match="`dense` has"):
        PackedMatrix.from_dense(dense)
