// What the AVX-512 sources share: when their fast paths apply, scratch memory, scales of a row, small conversions.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "api.h"

namespace stillhouse::avx512 {

constexpr int64_t CHUNK = 128;  // weights in 64 bytes of codes
constexpr int64_t TILE = 64;    // columns of a panel: 4 vectors of 16
constexpr int MAX_ROWS = 6;     // rows of a register tile: 6 x 4 accumulators + 4 panel vectors + a broadcast fit 32 registers

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where scales sit on lanes: every 8 weights along K share one, and no row starts inside a byte or a block.
inline bool is_regular(const sh_weight &w) {
    const bool lanes = w.group == 8 || w.group == 16 || w.group == 32 || w.group == 64 || (w.group > 0 && w.group % CHUNK == 0);
    if (w.format == SH_INT4) return lanes;
    return lanes && w.columns % 2 == 0 && w.columns % w.group == 0;
}

// A weight with the sizes that every row asks for; a 64-bit division costs as much as decoding 64 weights.
struct Weight : sh_weight {
    int64_t groups, row_bytes;
    explicit Weight(const sh_weight &w) : sh_weight(w), groups(ceil_div(w.columns, w.group)), row_bytes(ceil_div(w.columns, 2)) {}
    const uint8_t *row_codes(int64_t row) const { return codes + row * row_bytes; }
};

// Scratch that grows and stays with its thread: a call of a few microseconds has no time for malloc.
struct Scratch {
    struct Free { void operator()(void *p) const { std::free(p); } };
    std::unique_ptr<void, Free> memory;
    size_t size = 0;
    void *get(size_t bytes) {
        if (bytes > size) {
            const size_t rounded = (bytes + 4095) / 4096 * 4096;
            memory.reset();
            memory.reset(std::aligned_alloc(64, rounded));
            size = memory ? rounded : 0;
        }
        return memory.get();
    }
};

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

// f32 scales of up to 16 groups of a regular row, from group `first` on; 0 beyond `count`.
inline __m512 scales16(const Weight &w, int64_t row, int64_t first, int64_t count) {
    const __mmask16 mask = first_lanes(count);
    const int64_t base = row * w.groups + first;
    if (w.format == SH_INT4) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w.scales + base));
    if (w.absmax) return _mm512_maskz_loadu_ps(mask, w.absmax + base);
    if (count <= 4) {  // a gather costs as much for 4 as for 16
        alignas(16) float few[4] = {0, 0, 0, 0};
        for (int64_t i = 0; i < count; ++i) few[i] = w.nested_map[w.nested_codes[base + i]] * w.nested_absmax[(base + i) >> 8] + w.nested_offset[0];
        return _mm512_zextps128_ps512(_mm_load_ps(few));
    }
    const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.nested_codes + base));
    const __m512 level = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, code, w.nested_map, 4);
    __m512 outer = _mm512_set1_ps(w.nested_absmax[base >> 8]);
    const int64_t boundary = ((base >> 8) + 1) << 8;  // the next 256 blocks have another factor
    if (boundary < base + std::min<int64_t>(count, 16))
        outer = _mm512_mask_mov_ps(outer, (__mmask16)(0xffffu << (boundary - base)), _mm512_set1_ps(w.nested_absmax[boundary >> 8]));
    // Two roundings, as bitsandbytes does it; compiled with -ffp-contract=off.
    return _mm512_maskz_add_ps(mask, _mm512_mul_ps(level, outer), _mm512_set1_ps(w.nested_offset[0]));
}

// Zero points likewise.
inline __m512 zeros16(const Weight &w, int64_t row, int64_t first, int64_t count) {
    const uint8_t *zeros = w.zero_points + row * w.groups + first;
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), zeros)));
}

// The same for any number of groups, into memory.
inline void row_scales(const Weight &w, int64_t row, int64_t first, int64_t count, float *out) {
    for (int64_t g = 0; g < count; g += 16) _mm512_mask_storeu_ps(out + g, first_lanes(count - g), scales16(w, row, first + g, count - g));
}

inline void row_zeros(const Weight &w, int64_t row, int64_t first, int64_t count, float *out) {
    for (int64_t g = 0; g < count; g += 16) _mm512_mask_storeu_ps(out + g, first_lanes(count - g), zeros16(w, row, first + g, count - g));
}

// The 16 levels: of int4 q - 8, or q alone where a zero point is subtracted later.
inline __m512 levels(const Weight &w) {
    if (w.format != SH_INT4) return _mm512_loadu_ps(w.table);
    const __m512 q = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return w.zero_points ? q : _mm512_sub_ps(q, _mm512_set1_ps(8));
}

inline __m512 load_f32(const void *p, int32_t dtype, int64_t i, __mmask16 mask) {
    if (dtype == SH_F32) return _mm512_maskz_loadu_ps(mask, (const float *)p + i);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store_f32(void *p, int32_t dtype, int64_t i, __mmask16 mask, __m512 v) {
    if (dtype == SH_F32) {
        _mm512_mask_storeu_ps((float *)p + i, mask, v);
    } else {
        _mm256_mask_storeu_epi16((uint16_t *)p + i, mask, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

inline float scalar_f32(const void *p, int32_t dtype, int64_t i) {
    if (dtype == SH_F32) return ((const float *)p)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Threads for a product that reads `bytes` of codes for `m` rows: a team costs some microseconds to wake.
inline int team(int32_t threads, int64_t bytes, int64_t m) {
    return threads <= 1 || bytes * m < (128 << 10) ? 1 : (int)threads;
}

// Rows of activations for one piece of work, a multiple of `tile_rows`: at most `most`. Few column tiles leave a thread idle at the
// end: then rows are split too, and panels decoded once more for each part.
inline int64_t rows_a_part(int64_t m, int64_t most, int64_t tiles, int threads, int64_t tile_rows) {
    int64_t parts = ceil_div(m, most);
    if (threads > 1 && tiles % threads && tiles < 8 * threads && m >= 64) parts = std::max<int64_t>(parts, threads);
    return ceil_div(ceil_div(m, parts), tile_rows) * tile_rows;
}

// Write the f32 sums c [rows][64], plus bias, as columns `column` ... of out [.][width] from row m0 on.
inline void store_tile(const float *c, int64_t rows, const void *bias, int32_t bias_dtype, void *out, int32_t dtype, int64_t width, int64_t column, int64_t m0) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t q = 0; q < TILE && column + q < width; q += 16) {
            const __mmask16 mask = first_lanes(width - column - q);
            __m512 v = _mm512_load_ps(c + r * TILE + q);
            if (bias) v = _mm512_add_ps(v, load_f32(bias, bias_dtype, column + q, mask));
            store_f32(out, dtype, (m0 + r) * width + column + q, mask, v);
        }
}

int32_t gemv(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, int threads);
int32_t gemv_int8(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, int threads);
// `exact` keeps bf16 activations in f32 and meets f32 weights.
int32_t gemm_forward(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, bool exact, int threads);
int32_t gemm_backward(const Weight &w, const void *dy, int32_t dtype, void *dx, int64_t m, bool exact, int threads);
int32_t gemm_int8(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, int threads);

}  // namespace stillhouse::avx512
