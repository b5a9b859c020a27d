// Panels: a block of the weight, decoded into the order in which the register tile reads it. 64 columns wide; the rows run
// over the reduced dimension in steps of 1 (f32), 2 (bf16, adjacent pairs in a dword) or 4 (int8, quads in a dword).
//
// Forward reduces over k, along which the bytes lie: 16 rows of packed dwords are transposed first, while they are still 4 bits
// (64 shuffles for 2,048 weights), and decoded afterwards. Backward reduces over n: rows decode in order and adjacent rows pair up.
#pragma once
#include "avx512.h"
#include "avx512_quantize.h"

namespace stillhouse::avx512 {

// k's (forward) or rows (backward: half of it) of a panel of 64 columns: 32 KiB, which stay in the L1 cache.
template <bool BF16> constexpr int64_t PANEL_DEPTH = BF16 ? 256 : 128;
constexpr int64_t INT8_PANEL_DEPTH = 512;

inline void transpose16(__m512i *v) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Dwords of 16 rows from row n and column k on: v[j] lane r = columns k + 8j ... of row n + r. Nothing outside the weight is read.
// `depth` is the k's of a panel: where in its row the next one starts.
inline void load_transposed(const Weight &w, int64_t n, int64_t k, int64_t depth, __m512i *v) {
    const int64_t bytes = w.row_bytes - k / 2, rows = std::min<int64_t>(16, w.rows - n);
    const __mmask64 mask = bytes >= 64 ? ~0ull : ~0ull >> (64 - bytes);
    const uint8_t *p = w.row_codes(n) + k / 2;
    for (int r = 0; r < 16; ++r) {
        v[r] = r < rows ? _mm512_maskz_loadu_epi8(mask, p + r * w.row_bytes) : _mm512_setzero_si512();
        // 16 streams of two lines each are more than the hardware foresees: ask for the next panel's.
        _mm_prefetch((const char *)p + r * w.row_bytes + depth / 2, _MM_HINT_T0);
    }
    transpose16(v);
}

// Scales (and zero points) of 64 rows for `count` groups from `first` on, as [group][64]; rows beyond the weight get 0.
inline void scale_panel(const Weight &w, int64_t n, int64_t first, int64_t count, float *scales, float *zeros) {
    __m512i v[16];
    for (int64_t c = 0; c < TILE; c += 16)
        for (int64_t g = 0; g < count; g += 16)
            for (int part = 0; part < (w.zero_points ? 2 : 1); ++part) {
                for (int r = 0; r < 16; ++r) {
                    __m512 row = _mm512_setzero_ps();
                    if (n + c + r < w.rows) row = (part ? zeros16 : scales16)(w, n + c + r, first + g, count - g);
                    v[r] = _mm512_castps_si512(row);
                }
                transpose16(v);
                for (int64_t j = 0; j < std::min<int64_t>(16, count - g); ++j) _mm512_store_si512((part ? zeros : scales) + (g + j) * TILE + c, v[j]);
            }
}

inline __m512 decode16(__m512i shifted, __m512 table, bool zero_points, __m512 zeros, __m512 scales) {
    __m512 level = _mm512_permutexvar_ps(shifted, table);
    if (zero_points) level = _mm512_sub_ps(level, zeros);
    return _mm512_mul_ps(level, scales);
}

// 32 words [16 of a][16 of b] to 16 dwords (a, b).
inline __m512i interleave(__m512 a, __m512 b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

// Forward panel of the 64 rows from n on and k in [k0, k0 + size), k0 a multiple of 128: bf16 pairs [ceil(size/2)][64] dwords,
// rounded once from f32, or f32 [size][64]. Written up to the next multiple of 8. FLIP: the high nibble is the even element.
template <bool BF16, bool FLIP, bool ZERO>
void forward_panel(const Weight &w, int64_t n, int64_t k0, int64_t size, const float *scales, const float *zeros, void *out) {
    const __m512 table = levels(w);
    for (int64_t c = 0; c < TILE; c += 16) {
        if (n + c >= w.rows) {
            for (int64_t k = 0; k < (BF16 ? (size + 1) / 2 : size); ++k) _mm512_store_si512((int32_t *)out + k * TILE + c, _mm512_setzero_si512());
            continue;
        }
        for (int64_t k = 0; k < size; k += CHUNK) {
            __m512i v[16];
            load_transposed(w, n + c, k0 + k, PANEL_DEPTH<BF16>, v);
            const int octets = (int)std::min<int64_t>(16, ceil_div(size - k, 8));
            for (int j = 0; j < octets; ++j) {
                const int64_t g = (k0 + k + 8 * j) / w.group - k0 / w.group;
                const __m512 scale = _mm512_load_ps(scales + g * TILE + c);
                const __m512 zero = ZERO ? _mm512_load_ps(zeros + g * TILE + c) : _mm512_setzero_ps();
#pragma GCC unroll 4
                for (int p = 0; p < 4; ++p) {
                    const __m512 even = decode16(_mm512_srli_epi32(v[j], 8 * p + (FLIP ? 4 : 0)), table, ZERO, zero, scale);
                    const __m512 odd = decode16(_mm512_srli_epi32(v[j], 8 * p + (FLIP ? 0 : 4)), table, ZERO, zero, scale);
                    if (BF16) {
                        _mm512_store_si512((int32_t *)out + ((k + 8 * j) / 2 + p) * TILE + c, interleave(even, odd));
                    } else {
                        _mm512_store_ps((float *)out + (k + 8 * j + 2 * p) * TILE + c, even);
                        _mm512_store_ps((float *)out + (k + 8 * j + 2 * p + 1) * TILE + c, odd);
                    }
                }
            }
        }
    }
}

template <bool BF16>
void forward_panel(const Weight &w, int64_t n, int64_t k0, int64_t size, const float *scales, const float *zeros, void *out) {
    if (w.format != SH_INT4) {
        forward_panel<BF16, true, false>(w, n, k0, size, scales, zeros, out);
    } else if (w.zero_points) {
        forward_panel<BF16, false, true>(w, n, k0, size, scales, zeros, out);
    } else {
        forward_panel<BF16, false, false>(w, n, k0, size, scales, zeros, out);
    }
}

// The same block as unsigned bytes for dpbusd: dword 2i holds the even k's of octet i, dword 2i + 1 the odd ones.
inline void forward_panel_u8(const Weight &w, int64_t n, int64_t k0, int64_t size, uint8_t *out) {
    const __m512i low = _mm512_set1_epi8(15);
    const bool table16 = w.format != SH_INT4;
    const __m512i table = table16 ? levels_u8(w.table) : _mm512_setzero_si512();
    int32_t *dwords = (int32_t *)out;
    for (int64_t c = 0; c < TILE; c += 16) {
        for (int64_t k = 0; k < size; k += CHUNK) {
            __m512i v[16];
            if (n + c < w.rows) load_transposed(w, n + c, k0 + k, INT8_PANEL_DEPTH, v);
            const int octets = (int)std::min<int64_t>(16, ceil_div(size - k, 8));
            for (int j = 0; j < octets; ++j) {
                __m512i first = _mm512_setzero_si512(), second = first;
                if (n + c < w.rows) {
                    first = _mm512_and_si512(v[j], low);
                    second = _mm512_and_si512(_mm512_srli_epi16(v[j], 4), low);
                    if (table16) {
                        const __m512i odd = _mm512_shuffle_epi8(table, first);
                        first = _mm512_shuffle_epi8(table, second);
                        second = odd;
                    }
                }
                _mm512_store_si512(dwords + (2 * ((k + 8 * j) / 8)) * TILE + c, first);
                _mm512_store_si512(dwords + (2 * ((k + 8 * j) / 8) + 1) * TILE + c, second);
            }
        }
    }
}

// Which of a row's (up to 16) scales in 128 columns each 16 of them take.
struct ScaleIndex {
    __m512i of[8];
    explicit ScaleIndex(const Weight &w) {
        for (int q = 0; q < 8; ++q) {
            alignas(64) int32_t lanes[16];
            for (int l = 0; l < 16; ++l) lanes[l] = w.group < CHUNK ? (int32_t)((16 * q + l) / w.group) : 0;
            of[q] = _mm512_load_si512(lanes);
        }
    }
};

// 128 columns of a row, decoded in order, 16 at a time; bytes beyond the row count as 0.
template <bool FLIP, bool ZERO>
struct RowPart {
    __m512 scales, zeros;
    const uint8_t *p;
    alignas(64) uint8_t tail[64];

    RowPart(const Weight &w, int64_t n, int64_t k) {
        const int64_t bytes = w.row_bytes - k / 2, first = k / w.group;
        const int64_t count = std::min<int64_t>(w.group >= CHUNK ? 1 : CHUNK / w.group, w.groups - first);
        scales = scales16(w, n, first, count);
        if (ZERO) zeros = zeros16(w, n, first, count);
        p = w.row_codes(n) + k / 2;
        if (bytes < 64) {
            _mm512_store_si512(tail, _mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), p));
            p = tail;
        }
    }
    __m512 at(int q, const ScaleIndex &index, __m512 table) const {
        // Each byte in a qword of its own; the nibble of the even element in the low dword, of the odd one in the high dword.
        const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(p + 8 * q)));
        const __m512i pair = FLIP ? _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32)) : _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
        __m512 level = _mm512_permutexvar_ps(pair, table);
        if (ZERO) level = _mm512_sub_ps(level, _mm512_permutexvar_ps(index.of[q], zeros));
        return _mm512_mul_ps(level, _mm512_permutexvar_ps(index.of[q], scales));
    }
};

// Backward panels of the 64 HALVES columns from k on (a multiple of 64) and rows [n0, n0 + size): one or two panels of 64
// columns, `stride` dwords apart; bf16 pairs of rows [ceil(size/2)][64], or f32 [size][64]. 128 columns are whole cache lines of
// codes. Columns beyond the weight hold anything finite; their products are not stored.
template <bool BF16, bool FLIP, bool ZERO, int HALVES>
void backward_panel(const Weight &w, int64_t k, int64_t n0, int64_t size, int32_t *out, int64_t stride) {
    const __m512 table = levels(w);
    const ScaleIndex index(w);
    for (int64_t i = 0; i < size; i += 2) {
        const char *ahead = (const char *)w.row_codes(n0 + i + 16) + k / 2;
        _mm_prefetch(ahead, _MM_HINT_T0);
        _mm_prefetch(ahead + w.row_bytes, _MM_HINT_T0);
        const bool pair = i + 1 < size;  // the partner of a last single row is 0
        const RowPart<FLIP, ZERO> a(w, n0 + i, k), b(w, n0 + i + (pair ? 1 : 0), k);
#pragma GCC unroll 8
        for (int q = 0; q < 4 * HALVES; ++q) {
            int32_t *to = out + q / 4 * stride + q % 4 * 16;
            const __m512 first = a.at(q, index, table), second = _mm512_maskz_mov_ps(pair ? 0xffff : 0, b.at(q, index, table));
            if (BF16) {
                _mm512_store_si512(to + i / 2 * TILE, interleave(first, second));
            } else {
                _mm512_store_ps(to + i * TILE, first);
                if (pair) _mm512_store_ps(to + (i + 1) * TILE, second);
            }
        }
    }
}

template <bool BF16, int HALVES>
void backward_panel(const Weight &w, int64_t k, int64_t n0, int64_t size, int32_t *out, int64_t stride) {
    if (w.format != SH_INT4) {
        backward_panel<BF16, true, false, HALVES>(w, k, n0, size, out, stride);
    } else if (w.zero_points) {
        backward_panel<BF16, false, true, HALVES>(w, k, n0, size, out, stride);
    } else {
        backward_panel<BF16, false, false, HALVES>(w, k, n0, size, out, stride);
    }
}

}  // namespace stillhouse::avx512
