"""Products of vectors with each other, for half the price of a matrix product.

▓▓            a stripe of rows against the columns up to its own end:
▓▓▓▓          what lies right of it is a mirror image
▓▓▓▓▓▓
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Narrower stripes leave out more, but a product of narrow matrices is slower per element.
_STRIPE = 128
_MOST_STRIPES = 12

HELD_PRODUCTS = 2**24
"""The most products that a stripe has, 64 MiB in float32."""


def stripes(count: int) -> Iterator[slice]:
    """Cuts `count` rows into stripes; a symmetric matrix is known from each stripe's columns up to its own end."""
    width = max(min(max(_STRIPE, -(-count // _MOST_STRIPES)), HELD_PRODUCTS // max(count, 1)), 1)
    for start in range(0, count, width):
        yield slice(start, min(start + width, count))


def inner_products(vectors: Tensor) -> Tensor:
    """Inner product of each two vectors.

    Args:
        vectors: Shape (n, C), float.

    Returns:
        Symmetric within rounding, shape (n, n), same dtype.

    Example:
        >>> inner_products(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        tensor([[5., 3.],
                [3., 9.]])
    """
    products = vectors.new_empty(len(vectors), len(vectors))
    for rows in stripes(len(vectors)):
        torch.mm(vectors[rows], vectors[: rows.stop].T, out=products[rows, : rows.stop])
        products[: rows.start, rows] = products[rows, : rows.start].T
    return products


def running_sums(values: Tensor, dim: int = -1) -> Tensor:
    """Sums of the values up to each of them, along one dimension; the same bits in every run if torch is told so.

    A GPU adds floats in any order, which torch refuses under `use_deterministic_algorithms`. There the values become
    multiples of 2^-52 of their total: sums of integers do not depend on the order.

    Args:
        values: What is summed up, float32 or float64 of any shape.
        dim: Dimension along which sums run.

    Example:
        >>> running_sums(torch.tensor([1.0, 2.0, 4.0]))
        tensor([1., 3., 7.])
    """
    if not (values.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values.cumsum(dim)
    precise = values.double()
    unit = precise.abs().sum(dim, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 2**52
    return ((precise / unit).round().long().cumsum(dim) * unit).to(values.dtype)


def invert_lower_(lower: Tensor) -> Tensor:
    r"""Turn a lower triangular matrix into its inverse, by halves: a third of the work of solving for the identity.

    .. math:: \begin{pmatrix} A & 0 \\ B & C \end{pmatrix}^{-1} =
        \begin{pmatrix} A^{-1} & 0 \\ -C^{-1} B A^{-1} & C^{-1} \end{pmatrix}

    Args:
        lower: Shape (n, n), float, diagonal without zeros, zeros above it; overwritten.

    Returns:
        The same tensor.

    Example:
        >>> invert_lower_(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[ 0.5000,  0.0000],
                [-0.5000,  1.0000]])
    """
    if len(lower) <= _STRIPE:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    half = len(lower) // 2
    first, second = slice(None, half), slice(half, None)
    left, right = invert_lower_(lower[first, first]), invert_lower_(lower[second, second])
    corner = lower[second, first]
    torch.mm(right, corner @ left, out=corner).neg_()
    return lower


def invert_positive_(matrix: Tensor) -> Tensor:
    r"""Turn a symmetric positive definite matrix into its inverse, by its Cholesky factor, at the rate of products.

    The inverse of the factor comes by halves, as the factor's rest needs that of its first half anyway:

    .. math:: \begin{pmatrix} A & \cdot \\ B & C \end{pmatrix} = L L^\top, \quad
        L^{-1} = \begin{pmatrix} L_A^{-1} & 0 \\ -L_S^{-1} B L_A^{-\top} L_A^{-1} & L_S^{-1} \end{pmatrix}
        \quad\text{with}\quad S = C - B L_A^{-\top} (B L_A^{-\top})^\top

    Two thirds to three quarters of the time that LAPACK's factor and `invert_lower_` take (n = 1024 to 4096, one
    thread of an Intel Xeon), and as exact. Beside the matrix it takes a quarter of it.

    Args:
        matrix: Shape (n, n), float; overwritten. What is above the diagonal is not looked at.

    Returns:
        The same tensor, symmetric within rounding; of no use where the matrix is not positive definite,
        which is not checked.

    Example:
        >>> invert_positive_(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  1.0000]])
    """
    _to_inverse_factor_(matrix)
    return inner_products_of_lower_(matrix)


def _to_inverse_factor_(matrix: Tensor) -> None:
    """Turn a symmetric positive definite matrix into the inverse of its lower Cholesky factor, zeros above it."""
    if len(matrix) <= _STRIPE:
        factor = torch.linalg.cholesky_ex(matrix)[0]
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
        return
    half = len(matrix) // 2
    first, corner, second = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _to_inverse_factor_(first)
    below = torch.empty_like(corner)
    _lower_times(first, corner.T, out=below.T)
    for rows in stripes(len(second)):
        second[rows, : rows.stop].addmm_(below[rows], below[: rows.stop].T, alpha=-1)
    _to_inverse_factor_(second)
    _times_lower(below, first, out=corner)
    _lower_times(second, corner, out=below)
    torch.neg(below, out=corner)
    matrix[:half, half:] = 0.0


def _times_lower(left: Tensor, lower: Tensor, out: Tensor) -> None:
    """A product with a lower triangular matrix, without the half that is zero."""
    if len(lower) <= 2 * _STRIPE:
        torch.mm(left, lower, out=out)
        return
    half = len(lower) // 2
    _times_lower(left[:, :half], lower[:half, :half], out[:, :half])
    out[:, :half].addmm_(left[:, half:], lower[half:, :half])
    _times_lower(left[:, half:], lower[half:, half:], out[:, half:])


def _lower_times(lower: Tensor, right: Tensor, out: Tensor) -> None:
    if len(lower) <= 2 * _STRIPE:
        torch.mm(lower, right, out=out)
        return
    half = len(lower) // 2
    _lower_times(lower[:half, :half], right[:half], out[:half])
    _lower_times(lower[half:, half:], right[half:], out[half:])
    out[half:].addmm_(lower[half:, :half], right[:half])


def inner_products_of_lower_(lower: Tensor) -> Tensor:
    r"""Turn a lower triangular matrix L into :math:`L^\top L`, for a sixth of a matrix product.

    Args:
        lower: Shape (n, n), float, zeros above the diagonal; overwritten.

    Returns:
        The same tensor, symmetric within rounding.

    Example:
        >>> inner_products_of_lower_(torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
        tensor([[5., 3.],
                [3., 9.]])
    """
    for rows in stripes(len(lower)):
        # Rows above the stripe are zero in its columns, and what was written to them is not looked at again.
        products = lower[rows.start :, rows].T @ lower[rows.start :, : rows.stop]
        lower[rows, : rows.stop] = products
        lower[: rows.start, rows] = products[:, : rows.start].T
    return lower
