// Nested absmax of a whole row: nested_map[code] * nested_absmax + nested_offset for every block.
//
// Gathering from the map's 256 floats cost as much as a fifth of the decode loop. Instead the map is split once a call into its four byte
// planes, and 64 codes look all of them up with vpermi2b, 12 instructions for 64 floats and 9 to put the bytes together.
#pragma once
#include "avx512.h"

namespace stillhouse::avx512 {

struct NestedTable {
    alignas(64) uint8_t planes[4][256];

    explicit NestedTable(const Weight &w) {
        if (w.format == SH_INT4 || w.absmax) return;
        for (int i = 0; i < 16; ++i) {
            __m512i bits = _mm512_loadu_si512(w.nested_map + 16 * i);
            for (int p = 0; p < 4; ++p, bits = _mm512_srli_epi32(bits, 8)) _mm_store_si128((__m128i *)(planes[p] + 16 * i), _mm512_cvtepi32_epi8(bits));
        }
    }

    // f32 scales of all groups of a regular row of a table format, nested or not.
    void row_scales(const Weight &w, int64_t row, float *out) const {
        if (w.absmax) return avx512::row_scales(w, row, 0, w.groups, out);
        const __m512 offset = _mm512_set1_ps(w.nested_offset[0]);
        for (int64_t g = 0; g < w.groups; g += 64) {
            const int64_t count = std::min<int64_t>(64, w.groups - g), base = row * w.groups + g;
            __m512 level[4];
            look_up(_mm512_maskz_loadu_epi8(~0ull >> (64 - count), w.nested_codes + base), level);
            for (int64_t j = 0; 16 * j < count; ++j) {
                const int64_t block = base + 16 * j, boundary = ((block >> 8) + 1) << 8;  // the next 256 blocks have another factor
                const int64_t here = std::min<int64_t>(16, count - 16 * j);
                __m512 outer = _mm512_set1_ps(w.nested_absmax[block >> 8]);
                if (boundary < block + here)
                    outer = _mm512_mask_mov_ps(outer, (__mmask16)(0xffffu << (boundary - block)), _mm512_set1_ps(w.nested_absmax[boundary >> 8]));
                _mm512_mask_storeu_ps(out + g + 16 * j, first_lanes(here), _mm512_add_ps(_mm512_mul_ps(level[j], outer), offset));
            }
        }
    }

   private:
    void look_up(__m512i codes, __m512 *level) const {
        // The unpacks below work within 128-bit lanes; this order of the codes lets the floats come out in theirs.
        codes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        __m512i b[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
            const __m512i *t = (const __m512i *)planes[p];
            b[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t[0], codes, t[1]), _mm512_permutex2var_epi8(t[2], codes, t[3]));
        }
        const __m512i low01 = _mm512_unpacklo_epi8(b[0], b[1]), high01 = _mm512_unpackhi_epi8(b[0], b[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(b[2], b[3]), high23 = _mm512_unpackhi_epi8(b[2], b[3]);
        level[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
        level[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
        level[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
        level[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
    }
};

}  // namespace stillhouse::avx512
