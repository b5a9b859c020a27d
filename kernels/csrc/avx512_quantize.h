// Activations in 8 bits: each 32 along K of a row share the scale absmax / 127, and a = round_half_even(x / scale).
//
// A block that holds NaN or Inf gets NaN as its scale, and so does every sum that it enters.
#pragma once
#include "avx512.h"

namespace stillhouse::avx512 {

// The 16 levels of a table as unsigned bytes, round(127 level) + 127, in each 128-bit lane for vpshufb.
inline __m512i levels_u8(const float *table) {
    const __m512i level = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(127.0f)));
    return _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_add_epi32(level, _mm512_set1_epi32(127))));
}

// Quantize 32 values of a row from k on; columns beyond `columns` count as 0. Returns the block's scale.
inline float quantize_block(const void *x, int32_t dtype, int64_t k, int64_t columns, int8_t *out) {
    const __m512 v0 = load_f32(x, dtype, k, first_lanes(columns - k)), v1 = load_f32(x, dtype, k + 16, first_lanes(columns - k - 16));
    const __m512 top = _mm512_max_ps(_mm512_abs_ps(v0), _mm512_abs_ps(v1));
    const float absmax = _mm512_reduce_max_ps(top);
    // max() drops a NaN that stands in its first operand: look for one, and for Inf, in the values themselves.
    const int special = _mm512_fpclass_ps_mask(v0, 0x99) | _mm512_fpclass_ps_mask(v1, 0x99);
    const float scale = special ? __builtin_nanf("") : absmax / 127.0f;
    const __m512 divisor = _mm512_set1_ps(scale > 0 ? scale : 1.0f);
    const __m512i a0 = _mm512_cvtps_epi32(_mm512_div_ps(v0, divisor)), a1 = _mm512_cvtps_epi32(_mm512_div_ps(v1, divisor));
    _mm_storeu_si128((__m128i *)out, _mm512_cvtsepi32_epi8(a0));
    _mm_storeu_si128((__m128i *)(out + 16), _mm512_cvtsepi32_epi8(a1));
    return scale;
}

// For the decode loop: of each chunk the even k's, then the odd ones; -offset sum(a) of each lane's 8; the scale of each lane.
inline void quantize_row_lanes(const void *x, int32_t dtype, int64_t columns, int64_t chunks, int offset, int8_t *a, int32_t *start, float *scales) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t c = 0; c < chunks; ++c) {
        alignas(64) int8_t part[CHUNK];
        for (int b = 0; b < 4; ++b) {
            const float scale = quantize_block(x, dtype, c * CHUNK + 32 * b, columns, part + 32 * b);
            _mm_storeu_ps(scales + c * 16 + 4 * b, _mm_set1_ps(scale));
        }
        const __m512i v0 = _mm512_load_si512(part), v1 = _mm512_load_si512(part + 64);
        const __m256i e0 = _mm512_cvtepi16_epi8(v0), e1 = _mm512_cvtepi16_epi8(v1);
        const __m256i o0 = _mm512_cvtepi16_epi8(_mm512_srli_epi16(v0, 8)), o1 = _mm512_cvtepi16_epi8(_mm512_srli_epi16(v1, 8));
        const __m512i evens = _mm512_inserti64x4(_mm512_castsi256_si512(e0), e1, 1), odds = _mm512_inserti64x4(_mm512_castsi256_si512(o0), o1, 1);
        _mm512_store_si512(a + c * CHUNK, evens);
        _mm512_store_si512(a + c * CHUNK + 64, odds);
        const __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, evens), ones, odds);
        _mm512_store_si512(start + c * 16, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-offset)));
    }
}

// For the matrix loop: of each 8 the four even k's, then the four odd ones, as two dwords to broadcast; of each 32 one scale and
// one -offset sum(a). `blocks` is ceil(columns / 32).
inline void quantize_row_octets(const void *x, int32_t dtype, int64_t columns, int64_t blocks, int offset, int8_t *a, int32_t *start, float *scales) {
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int64_t b = 0; b < blocks; ++b) {
        alignas(32) int8_t part[32];
        scales[b] = quantize_block(x, dtype, 32 * b, columns, part);
        const __m256i v = _mm256_load_si256((const __m256i *)part);
        _mm256_storeu_si256((__m256i *)(a + 32 * b), _mm256_shuffle_epi8(v, order));
        const __m256i sum = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), v);
        const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        const __m128i quarter = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        start[b] = -offset * _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
    }
}

}  // namespace stillhouse::avx512
