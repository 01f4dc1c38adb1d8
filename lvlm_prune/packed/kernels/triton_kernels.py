"""The GPU kernels, in Triton. Only imported where Triton is installed; `gpu` calls them.

A matrix is kept in chunks of `CHUNK` columns of one row:

    mask     int32 (rows, chunks * CHUNK / 32): bit j of word w stands for column 32 w + j; past the matrix, zeros
    start    int32 (rows, chunks): where the values of a chunk begin
    values   row after row

so that a program finds the place of every value by counting bits of its own chunk. Weights are read packed and become
dense in registers (Flash-LLM, arXiv 2309.10285, calls it load as sparse, compute as dense).
"""

import triton
import triton.language as tl

CHUNK = 256
"""Columns whose first value `start` names; it costs 32 bits for each of them."""


@triton.jit
def _count_bits(v):
    """Bits set in each uint32."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _expand(values, mask, start, row, rows, chunk, chunks, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """One chunk of ROWS rows, dense, of shape (ROWS, CHUNK)."""
    WORDS: tl.constexpr = CHUNK // 32
    inside = row < rows
    place = (row * chunks + chunk)[:, None]
    word = tl.load(mask + place * WORDS + tl.arange(0, WORDS)[None, :], mask=inside[:, None], other=0)
    word = word.to(tl.uint32, bitcast=True)
    count = _count_bits(word)
    first = tl.load(start + place, mask=inside[:, None], other=0) + tl.cumsum(count, 1) - count
    bit = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    word = word[:, :, None]
    below = word & ((tl.full((1, 1, 1), 1, tl.uint32) << bit) - 1)
    weight = tl.load(values + first[:, :, None] + _count_bits(below), mask=((word >> bit) & 1) != 0, other=0.0)
    return tl.reshape(weight, (ROWS, CHUNK))


@triton.jit
def _store(y, sums, bias, row, token, rows, tokens, HAS_BIAS: tl.constexpr):
    """Sums of shape (tokens, rows) of one program, with the bias, in the dtype of y."""
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(y + token[:, None] * rows + row[None, :], sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def vector_kernel(
    x, values, mask, start, bias, y, rows, columns, tokens, chunks,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A few tokens, without tensor cores: each program has ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for chunk in range(chunks):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        weight = _expand(values, mask, start, row, rows, chunk, chunks, CHUNK, ROWS).to(tl.float32)
        for t in tl.static_range(TOKENS):
            # Past the last token the last one is read again, and what comes of it is not stored.
            place = tl.minimum(t, tokens - 1) * columns + column
            factor = tl.load(x + place, mask=column < columns, other=0.0).to(tl.float32)
            sums = tl.where((token == t)[:, None], sums + tl.sum(weight * factor[None, :], 1)[None, :], sums)
    _store(y, sums, bias, row, token, rows, tokens, HAS_BIAS)


@triton.jit
def matrix_kernel(
    x, values, mask, start, bias, y, rows, columns, tokens, chunks,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Some tens of tokens, with tensor cores. FLOAT: in float32, as Triton's interpreter has no bfloat16 product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for chunk in range(chunks):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        weight = _expand(values, mask, start, row, rows, chunk, chunks, CHUNK, ROWS)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        factor = tl.load(x + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
        if FLOAT:
            weight, factor = weight.to(tl.float32), factor.to(tl.float32)
        sums += tl.dot(factor, tl.trans(weight), input_precision="ieee")
    _store(y, sums, bias, row, token, rows, tokens, HAS_BIAS)


@triton.jit
def unpack_kernel(
    values, mask, start, dense, rows, columns, chunks, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The dense matrix: each program has one chunk of ROWS rows."""
    row, chunk = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    weight = _expand(values, mask, start, row, rows, chunk, chunks, CHUNK, ROWS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    # A place may lie beyond 2^31 elements.
    tl.store(dense + row[:, None].to(tl.int64) * columns + column[None, :], weight, mask=inside)
