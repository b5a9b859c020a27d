"""Triton device functions that read the canonical 4-bit tensors: eight weights from each 32-bit word of codes.

A word is eight consecutive weights of a row (K a multiple of 8), so that a tile of words is an eighth of the tile of weights:
int4 has weight j of a word in bits 4 j … 4 j + 3, nf4 and fp4 have the high nibble of each byte first. Scales go by the word,
because a group or block of a multiple of 8 weights never ends inside one. Everything is decoded in float32 and rounded at most
once, as the reference does.

The kernels that use this are launched with ``enable_fp_fusion=False`` and say ``tl.fma`` where they mean it: a contracted
``quant_map[code] * nested_absmax + offset`` would differ from bitsandbytes and the reference in the last bit.
"""

import triton
import triton.language as tl

NESTED_SHIFT = tl.constexpr(8)
"""log2 of ``reference.NF4_NESTED_BLOCK``."""


@triton.jit
def load_scales(
    scales_ptr, zero_points_ptr, nested_absmax_ptr, quant_map_ptr, offset_ptr, index, live, HAS_TABLE: tl.constexpr
):
    """Scale of the groups or blocks at ``index``, and what a code is reduced by before it multiplies (int4), both float32.

    Where ``live`` is false the scale is some finite number: a weight outside the matrix meets activations of 0, or is not
    stored.
    """
    if HAS_TABLE:
        zero = 0.0
        if nested_absmax_ptr is not None:
            code = tl.load(scales_ptr + index, mask=live, other=0).to(tl.int32)
            nested = tl.load(nested_absmax_ptr + (index >> NESTED_SHIFT), mask=live, other=0.0)
            level = tl.load(quant_map_ptr + code, mask=live, other=0.0)
            scale = level * nested + tl.load(offset_ptr)
        else:
            scale = tl.load(scales_ptr + index, mask=live, other=0.0)
    else:
        scale = tl.load(scales_ptr + index, mask=live, other=0.0).to(tl.float32)
        if zero_points_ptr is not None:
            zero = tl.load(zero_points_ptr + index, mask=live, other=0).to(tl.float32)
        else:
            zero = 8.0
    return scale, zero


@triton.jit
def load_tile_scales(
    scales_ptr,
    zero_points_ptr,
    nested_absmax_ptr,
    quant_map_ptr,
    offset_ptr,
    rows_N,
    N,
    start,
    NUM_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ONCE_A_GROUP: tl.constexpr,
):
    """:func:`load_scales` for every word of a tile (BLOCK_N, BLOCK_W) whose first word is ``start``, a multiple of BLOCK_W.

    ONCE_A_GROUP: where tiles and rows are whole groups, load one scale a group and hand it to the group's words through shared
    memory, which costs barriers and saves three loads a word where absmax is nested. Otherwise every word loads its own.
    """
    if ONCE_A_GROUP and NUM_WORDS % GROUP_WORDS == 0 and BLOCK_W % GROUP_WORDS == 0:
        GROUPS: tl.constexpr = BLOCK_W // GROUP_WORDS
        groups_G = start // GROUP_WORDS + tl.arange(0, GROUPS)
        live_NG = (rows_N < N)[:, None] & (groups_G < NUM_WORDS // GROUP_WORDS)[None, :]
        at_NG = rows_N[:, None] * (NUM_WORDS // GROUP_WORDS) + groups_G[None, :]
        scale_NG, zero = load_scales(
            scales_ptr, zero_points_ptr, nested_absmax_ptr, quant_map_ptr, offset_ptr, at_NG, live_NG, HAS_TABLE
        )
        scale = _for_each_word(scale_NG, BLOCK_N, GROUPS, GROUP_WORDS)
        if zero_points_ptr is not None:
            zero = _for_each_word(zero, BLOCK_N, GROUPS, GROUP_WORDS)
    else:
        words_W = start + tl.arange(0, BLOCK_W)
        live_NW = (rows_N < N)[:, None] & (words_W < NUM_WORDS)[None, :]
        if HAS_TABLE:
            at_NW = (rows_N[:, None] * NUM_WORDS + words_W[None, :]) // GROUP_WORDS
        else:
            # 64 bits, with which the compiler folds the constant distance between a thread's rows into the load.
            at_NW = rows_N.to(tl.int64)[:, None] * tl.cdiv(NUM_WORDS, GROUP_WORDS) + (words_W // GROUP_WORDS)[None, :]
        scale, zero = load_scales(
            scales_ptr, zero_points_ptr, nested_absmax_ptr, quant_map_ptr, offset_ptr, at_NW, live_NW, HAS_TABLE
        )
    return scale, zero


@triton.jit
def _for_each_word(per_group_NG, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr):
    spread = tl.broadcast_to(per_group_NG[:, :, None], [BLOCK_N, GROUPS, GROUP_WORDS])
    return tl.reshape(spread, [BLOCK_N, GROUPS * GROUP_WORDS])


@triton.jit
def decode(words, zero, table, mantissa, J: tl.constexpr):
    """Weight J of every word before it is scaled, float32: ``q - zero`` (int4, no table) or ``table[q]`` (nf4, fp4).

    ``mantissa`` is the bits of 2.0**23, 0x4B000000. It comes as an argument of the kernel, not as a constant: or-ing it to a
    masked word is then one instruction (a second immediate value would make it two), and those bind the int4 kernels.
    """
    if table is not None:
        shift: tl.constexpr = 8 * (J // 2) + 4 * (1 - J % 2) - 2
        byte_offset = (words << 2) & 0x3C if shift < 0 else (words >> shift) & 0x3C
        # 16 floats lie in one line of L1, so that a warp's look-up is one access; a table of 256 pairs would take up to 16. The
        # table is 64-byte aligned: or-ing is adding, and the upper half of every address stays in its register.
        address = table.to(tl.int64, bitcast=True) | byte_offset.to(tl.int64)
        return tl.load(address.to(tl.pointer_type(tl.float32), bitcast=True))
    # The nibble stays where it is in the word and goes into the mantissa of 2**23, without a conversion (of which a Hopper
    # multiprocessor does 64 a clock, as of integer operations, against 128 fmas); one exact fma takes that down to q - zero.
    # The upper four nibbles, beyond the mantissa, come down by one common shift.
    bits = ((words >> (16 * (J // 4))) & (0xF << (4 * (J % 4)))) | mantissa
    return tl.fma(bits.to(tl.float32, bitcast=True), 1.0 / (1 << (4 * (J % 4))), -(zero + (1 << (23 - 4 * (J % 4)))))


@triton.jit
def split_words(x, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Activations (BLOCK_M, 8 BLOCK_W) as eight tiles (BLOCK_M, BLOCK_W): those that meet weight 0…7 of each word."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_W, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join_words(y0, y1, y2, y3, y4, y5, y6, y7, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Undo :func:`split_words`: eight tiles (BLOCK_M, BLOCK_W) to one (BLOCK_M, 8 BLOCK_W)."""
    even = tl.join(tl.join(y0, y4), tl.join(y2, y6))
    odd = tl.join(tl.join(y1, y5), tl.join(y3, y7))
    return tl.reshape(tl.join(even, odd), [BLOCK_M, 8 * BLOCK_W])
