"""Triton forward ``y = x @ W.T`` over the canonical 4-bit tensors: one row, up to 64 rows, and the decode kernels for more.

Suffixes: M rows of x, N out_features, W words of eight weights along K, S splits of K. The weight is decoded in registers and
never in memory, except by ``decode_int4_kernel`` and ``decode_table_kernel``, whose output torch's matmul takes. K is a
compile-time constant (a model has three or four), so that a thread reaches all its rows from one address.
"""

import triton
import triton.language as tl

from stillhouse.kernels.triton_decode import decode, load_scales, load_tile_scales, split_words


@triton.jit
def gemv_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    nested_absmax_ptr,
    quant_map_ptr,
    offset_ptr,
    table_ptr,
    bias_ptr,
    y_ptr,
    N,
    mantissa,
    NUM_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One row of x: a program takes BLOCK_N rows of the weight over all of K, so there is nothing to add up afterwards.

    With BLOCK_W = threads, each thread holds one word of every row: the eight activations they meet are loaded once, by one
    16-byte access, and the loop has no barrier but those that hand out the scales of nf4 and fp4. The sum over a word is scaled
    after it is taken, and neither the weight nor the sum is rounded before the end, which is closer to the exact product than
    the reference in bfloat16.
    """
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums_NW = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float32)
    if PREFETCH:
        next_NW = _gemv_codes(codes_ptr, rows_N, N, 0, NUM_WORDS, BLOCK_W)
    for start in range(0, NUM_WORDS, BLOCK_W):
        if PREFETCH:
            # The next words are on their way while these are multiplied. For int4 alone: with a table the compiler starts so
            # many look-ups early that registers leave room for half as many warps.
            codes_NW = next_NW
            next_NW = _gemv_codes(codes_ptr, rows_N, N, start + BLOCK_W, NUM_WORDS, BLOCK_W)
        else:
            codes_NW = _gemv_codes(codes_ptr, rows_N, N, start, NUM_WORDS, BLOCK_W)
        scale_NW, zero_NW = load_tile_scales(
            scales_ptr,
            zero_points_ptr,
            nested_absmax_ptr,
            quant_map_ptr,
            offset_ptr,
            rows_N,
            N,
            start,
            NUM_WORDS,
            GROUP_WORDS,
            BLOCK_N,
            BLOCK_W,
            table_ptr is not None,
            table_ptr is not None,
        )
        k = start * 8 + tl.arange(0, 8 * BLOCK_W)
        x = tl.load(x_ptr + k, mask=k < NUM_WORDS * 8, other=0.0).to(tl.float32)
        x_1W = split_words(tl.reshape(x, [1, 8 * BLOCK_W]), 1, BLOCK_W)
        part_NW = decode(codes_NW, zero_NW, table_ptr, mantissa, 0) * x_1W[0]
        for j in tl.static_range(1, 8):
            weight_NW = decode(codes_NW, zero_NW, table_ptr, mantissa, j)
            part_NW = tl.fma(weight_NW, tl.broadcast_to(x_1W[j], [BLOCK_N, BLOCK_W]), part_NW)
        sums_NW = tl.fma(part_NW, scale_NW, sums_NW)
    y_N = tl.sum(sums_NW, axis=1)
    if bias_ptr is not None:
        y_N += tl.load(bias_ptr + rows_N, mask=rows_N < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows_N, y_N.to(y_ptr.dtype.element_ty), mask=rows_N < N)


@triton.jit
def _gemv_codes(codes_ptr, rows_N, N, start, NUM_WORDS: tl.constexpr, BLOCK_W: tl.constexpr):
    words_W = start + tl.arange(0, BLOCK_W)
    at_NW = rows_N.to(tl.int64)[:, None] * NUM_WORDS + words_W[None, :]
    # "Contiguous by one": otherwise the compiler gives a thread four words of a row but eight activations, which then have to
    # go through shared memory eight times a step.
    at_NW = tl.max_contiguous(at_NW, [1, 1])
    live_NW = (rows_N < N)[:, None] & (words_W < NUM_WORDS)[None, :]
    return tl.load(codes_ptr + at_NW, mask=live_NW, other=0, eviction_policy="evict_first")


@triton.jit
def skinny_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    nested_absmax_ptr,
    quant_map_ptr,
    offset_ptr,
    table_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    mantissa,
    NUM_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Up to BLOCK_M rows of x on the tensor cores; the weight is read once, each word decoded once.

    Computes the transpose, W @ x.T, so that the weight is the operand that the tensor cores take from registers; eight products
    over BLOCK_W words, one for each place in a word, instead of one over the weights put back in order. Grid (N tiles, SPLITS):
    with more than one split of K, y is the float32 partial sums (S, M, N), which :func:`add_splits_kernel` adds up in order.
    """
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_M = tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    WORDS_A_SPLIT: tl.constexpr = tl.cdiv(tl.cdiv(NUM_WORDS, BLOCK_W), SPLITS) * BLOCK_W
    first = split * WORDS_A_SPLIT
    sums_NM = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(first, min(first + WORDS_A_SPLIT, NUM_WORDS), BLOCK_W):
        words_W = start + tl.arange(0, BLOCK_W)
        live_NW = (rows_N < N)[:, None] & (words_W < NUM_WORDS)[None, :]
        codes_NW = tl.load(codes_ptr + rows_N.to(tl.int64)[:, None] * NUM_WORDS + words_W[None, :], mask=live_NW, other=0)
        scale_NW, zero_NW = load_tile_scales(
            scales_ptr,
            zero_points_ptr,
            nested_absmax_ptr,
            quant_map_ptr,
            offset_ptr,
            rows_N,
            N,
            start,
            NUM_WORDS,
            GROUP_WORDS,
            BLOCK_N,
            BLOCK_W,
            table_ptr is not None,
            True,
        )
        k = start * 8 + tl.arange(0, 8 * BLOCK_W)
        live_MK = (m_M < M)[:, None] & (k < NUM_WORDS * 8)[None, :]
        x_MK = tl.load(x_ptr + m_M[:, None] * (NUM_WORDS * 8) + k[None, :], mask=live_MK, other=0.0)
        x_MW = split_words(x_MK, BLOCK_M, BLOCK_W)
        for j in tl.static_range(8):
            weight_NW = decode(codes_NW, zero_NW, table_ptr, mantissa, j) * scale_NW
            sums_NM = tl.dot(weight_NW.to(x_MK.dtype), tl.trans(x_MW[j]), sums_NM)
    at_NM = (split * M + m_M)[None, :] * N + rows_N[:, None]
    if bias_ptr is not None and SPLITS == 1:
        sums_NM += tl.load(bias_ptr + rows_N, mask=rows_N < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + at_NM, sums_NM.to(y_ptr.dtype.element_ty), mask=(rows_N < N)[:, None] & (m_M < M)[None, :])


@triton.jit
def add_splits_kernel(parts_ptr, bias_ptr, y_ptr, SIZE, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add partial sums (S, M, N) in the order of the splits, then the bias, and round once: the same bits in every run."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * SIZE + at, mask=at < SIZE, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < SIZE)


@triton.jit
def decode_int4_kernel(
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    weight_ptr,
    K,
    NUM_BYTES,
    NUM_GROUPS,
    GROUP_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Decode BLOCK_B bytes of a row to memory, rounded once to its dtype. Any shape and group; grid (N, K / 2 / BLOCK_B)."""
    row = tl.program_id(0).to(tl.int64)
    bytes_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    codes = tl.load(codes_ptr + row * NUM_BYTES + bytes_B, mask=bytes_B < NUM_BYTES, other=0).to(tl.int32)
    k = tl.program_id(1) * (2 * BLOCK_B) + tl.arange(0, 2 * BLOCK_B)
    group = row * NUM_GROUPS + k // GROUP_SIZE
    scale = tl.load(scales_ptr + group, mask=k < K, other=0.0).to(tl.float32)
    zero = 8.0
    if zero_points_ptr is not None:
        zero = tl.load(zero_points_ptr + group, mask=k < K, other=0).to(tl.float32)
    q = tl.reshape(tl.join(codes & 0xF, codes >> 4), [2 * BLOCK_B]).to(tl.float32)
    tl.store(weight_ptr + row * K + k, ((q - zero) * scale).to(weight_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def decode_table_kernel(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    quant_map_ptr,
    offset_ptr,
    table_ptr,
    weight_ptr,
    SIZE,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Decode BLOCK_B bytes of a flattened nf4 or fp4 weight to memory, rounded once to its dtype. Any SIZE and block size."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    bytes_B = first + tl.arange(0, BLOCK_B)
    codes = tl.load(codes_ptr + bytes_B, mask=bytes_B < (SIZE + 1) // 2, other=0).to(tl.int32)
    at = first * 2 + tl.arange(0, 2 * BLOCK_B)
    scale, _ = load_scales(absmax_ptr, None, nested_absmax_ptr, quant_map_ptr, offset_ptr, at // BLOCK_SIZE, at < SIZE, True)
    level = tl.load(table_ptr + tl.reshape(tl.join(codes >> 4, codes & 0xF), [2 * BLOCK_B]))
    tl.store(weight_ptr + at, (level * scale).to(weight_ptr.dtype.element_ty), mask=at < SIZE)
