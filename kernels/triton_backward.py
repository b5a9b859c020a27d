"""Triton backward ``dx = dy @ W`` for up to 16 rows of dy, from the same 4-bit tensors as the forward: no second copy of W.

Suffixes as in triton_forward.py. Eight accumulators, one for each place in a word, so that a word is read and unpacked once;
they are what limits the rows (8 × BLOCK_W × BLOCK_M float32 in registers). More rows go through the decode kernels.
"""

import triton
import triton.language as tl

from stillhouse.kernels.triton_decode import decode, join_words, load_tile_scales


@triton.jit
def skinny_grad_x_kernel(
    dy_ptr,
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    nested_absmax_ptr,
    quant_map_ptr,
    offset_ptr,
    table_ptr,
    dx_ptr,
    M,
    N,
    mantissa,
    ROWS_A_SPLIT,
    NUM_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid (tiles of BLOCK_W words, splits of N). dx is the partial sums (S, M, K) where there are several splits, else (M, K).

    A split sums ROWS_A_SPLIT rows of the weight, a multiple of BLOCK_N; :func:`add_splits_kernel` adds the splits up in order.
    """
    first_word = tl.program_id(0) * BLOCK_W
    words_W = first_word + tl.arange(0, BLOCK_W)
    m_M = tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    first = split * ROWS_A_SPLIT
    dx0 = tl.zeros([BLOCK_M, BLOCK_W], dtype=tl.float32)
    dx1 = dx0
    dx2 = dx0
    dx3 = dx0
    dx4 = dx0
    dx5 = dx0
    dx6 = dx0
    dx7 = dx0
    for start in range(first, min(first + ROWS_A_SPLIT, N), BLOCK_N):
        rows_N = start + tl.arange(0, BLOCK_N)
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
            first_word,
            NUM_WORDS,
            GROUP_WORDS,
            BLOCK_N,
            BLOCK_W,
            table_ptr is not None,
            True,
        )
        live_MN = (m_M < M)[:, None] & (rows_N < N)[None, :]
        dy_MN = tl.load(dy_ptr + m_M[:, None] * N + rows_N[None, :], mask=live_MN, other=0.0)
        dx0 = _add_place(dx0, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 0)
        dx1 = _add_place(dx1, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 1)
        dx2 = _add_place(dx2, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 2)
        dx3 = _add_place(dx3, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 3)
        dx4 = _add_place(dx4, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 4)
        dx5 = _add_place(dx5, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 5)
        dx6 = _add_place(dx6, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 6)
        dx7 = _add_place(dx7, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, 7)
    dx_MK = join_words(dx0, dx1, dx2, dx3, dx4, dx5, dx6, dx7, BLOCK_M, BLOCK_W).to(dx_ptr.dtype.element_ty)
    k = tl.program_id(0) * (8 * BLOCK_W) + tl.arange(0, 8 * BLOCK_W)
    at_MK = (split * M + m_M).to(tl.int64)[:, None] * (NUM_WORDS * 8) + k[None, :]
    tl.store(dx_ptr + at_MK, dx_MK, mask=(m_M < M)[:, None] & (k < NUM_WORDS * 8)[None, :])


@triton.jit
def _add_place(dx_MW, dy_MN, codes_NW, scale_NW, zero_NW, table_ptr, mantissa, J: tl.constexpr):
    weight_NW = (decode(codes_NW, zero_NW, table_ptr, mantissa, J) * scale_NW).to(dy_MN.dtype)
    return tl.dot(dy_MN, weight_NW, dx_MW)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_W]
