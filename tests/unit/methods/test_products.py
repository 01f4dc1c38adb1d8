"""Half the products give the whole matrix, and halves of a matrix its inverse, whatever the size."""

import pytest
import torch

from lvlm_prune.methods.products import (
    HELD_PRODUCTS,
    inner_products,
    inner_products_of_lower_,
    invert_lower_,
    invert_positive_,
    stripes,
)

SIZES = [1, 2, 127, 128, 129, 300, 1700]


@pytest.mark.parametrize("count", SIZES)
def test_inner_products_are_those_of_a_matrix_product(count):
    vectors = torch.randn(count, 9, generator=torch.Generator().manual_seed(0))
    found = inner_products(vectors)
    torch.testing.assert_close(found, vectors @ vectors.T)
    torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize("count", SIZES)
def test_the_inverse_of_a_triangular_matrix(count):
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(count, count, generator=generator, dtype=torch.float64).tril(-1) / count
    lower.diagonal().copy_(1 + torch.rand(count, generator=generator, dtype=torch.float64))
    for memory in (
        lower.clone(),
        lower.T.clone(memory_format=torch.contiguous_format).T,
    ):  # row by row, and column by column as factors come
        found = invert_lower_(memory)
        assert found is memory
        torch.testing.assert_close(found @ lower, torch.eye(count, dtype=torch.float64))
        assert not found.triu(1).any()


@pytest.mark.parametrize("count", [0, 1, 128, 1536, 18944, 200_000])
def test_stripes_cover_all_rows_once_and_never_hold_too_much(count):
    found = list(stripes(count))
    assert [row for rows in found for row in range(rows.start, rows.stop)] == list(range(count))
    assert all((rows.stop - rows.start) * count <= HELD_PRODUCTS for rows in found)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 400])
def test_products_of_a_triangular_matrix_with_itself(size):
    lower = torch.randn(size, size, dtype=torch.float64).tril()
    expected = lower.T @ lower
    found = inner_products_of_lower_(lower)
    assert found is lower
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 1700])
def test_the_inverse_of_a_positive_definite_matrix(size):
    """Of products with a strong common part, as hidden states have; nothing above the diagonal is looked at."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2 * size, size, generator=generator) + 3 * torch.randn(2 * size, 1, generator=generator)
    matrix = tokens.T @ tokens / len(tokens) + 0.1 * torch.eye(size)
    expected = matrix.double().inverse()
    memory = matrix.tril() + torch.full_like(matrix, torch.nan).triu(1)

    found = invert_positive_(memory)

    assert found is memory
    assert torch.equal(found, found.T)
    by_lapack = torch.cholesky_inverse(torch.linalg.cholesky(matrix)).double()
    assert (found - expected).norm() <= 2 * (by_lapack - expected).norm() + 1e-7 * expected.norm()
