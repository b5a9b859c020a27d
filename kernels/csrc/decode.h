// Reading a packed weight: the scale of any block, and any part of any row as float32, exactly as kernels/reference.py decodes.
//
// Compile with -ffp-contract=off: nested absmax are a product and a sum with two roundings, and a compiler that fuses them
// changes the last bit. No function here reads a byte beyond the tensors that sh_weight describes.
#pragma once
#include <algorithm>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "numbers.h"

namespace stillhouse::SH_NAMESPACE {

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
inline int64_t groups_per_row(const sh_weight &w) { return ceil_div(w.columns, w.group); }

// The scale of one block: INT4 block = row * groups_per_row + group; TABLE16 block = flat element / group.
inline float sh_block_scale(const sh_weight &w, int64_t block) {
    if (w.format == SH_INT4) return f16_to_f32(w.scales[block]);
    if (w.absmax) return w.absmax[block];
    const float product = w.nested_map[w.nested_codes[block]] * w.nested_absmax[block >> 8];
    return product + w.nested_offset[0];
}

inline float sh_block_zero(const sh_weight &w, int64_t block) { return w.zero_points ? float(w.zero_points[block]) : 8.0f; }

// Scales, and INT4's zero points where `zeros` is given, of blocks first … first + count - 1.
inline void sh_row_scales(const sh_weight &w, int64_t first, int64_t count, float *scales, float *zeros) {
    for (int64_t i = 0; i < count; ++i) scales[i] = sh_block_scale(w, first + i);
    if (zeros)
        for (int64_t i = 0; i < count; ++i) zeros[i] = sh_block_zero(w, first + i);
}

// Code number `position` of a stream of nibbles.
template <bool HighFirst>
inline int nibble(const uint8_t *codes, int64_t position) {
    const uint8_t byte = codes[position >> 1];
    return bool(position & 1) == HighFirst ? byte & 15 : byte >> 4;
}

#ifdef __AVX2__
// 16 codes from 8 bytes, in order, one in each byte.
template <bool HighFirst>
inline __m128i sixteen_nibbles(const uint8_t *bytes) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes)), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(packed, mask), high = _mm_and_si128(_mm_srli_epi16(packed, 4), mask);
    return HighFirst ? _mm_unpacklo_epi8(high, low) : _mm_unpacklo_epi8(low, high);
}
#endif

// One number of a run: rounded to bfloat16 (and left in a float32) where that is asked for.
template <bool ToBf16>
inline float as_wanted(float value) {
    return ToBf16 ? round_to_bf16(value) : value;
}

#ifdef __AVX2__
template <bool ToBf16>
inline void store_wanted(float *out, __m256 value) {
    if (ToBf16) {
        // As round_to_bf16, but for NaN, which a finite scale cannot make.
        const __m256i bits = _mm256_castps_si256(value),
                      odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        value = _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(int32_t(0xffff0000u))));
    }
    _mm256_storeu_ps(out, value);
}
#endif

inline bool is_finite(float value) { return (float_bits(value) & 0x7f800000u) != 0x7f800000u; }

// out[i] = (code - zero) * scale for codes position … position + count - 1, low nibble first.
template <bool ToBf16>
inline void decode_int4_run(const uint8_t *codes, int64_t position, int64_t count, float scale, float zero,
                            float *__restrict out) {
    if (count > 0 && (position & 1)) {
        *out++ = as_wanted<ToBf16>((float(nibble<false>(codes, position)) - zero) * scale);
        ++position, --count;
    }
    const uint8_t *bytes = codes + (position >> 1);
    int64_t i = 0;
#ifdef __AVX2__
    const __m256 scales = _mm256_set1_ps(scale), zeros = _mm256_set1_ps(zero);
    for (; i + 16 <= count && (!ToBf16 || is_finite(scale)); i += 16) {
        const __m128i q = sixteen_nibbles<false>(bytes + i / 2);
        const __m256 a = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q));
        const __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(q, 8)));
        store_wanted<ToBf16>(out + i, _mm256_mul_ps(_mm256_sub_ps(a, zeros), scales));
        store_wanted<ToBf16>(out + i + 8, _mm256_mul_ps(_mm256_sub_ps(b, zeros), scales));
    }
#endif
    const int64_t pairs = count / 2;
    for (int64_t p = i / 2; p < pairs; ++p) {
        out[2 * p] = as_wanted<ToBf16>((float(bytes[p] & 15) - zero) * scale);
        out[2 * p + 1] = as_wanted<ToBf16>((float(bytes[p] >> 4) - zero) * scale);
    }
    if (count & 1) out[count - 1] = as_wanted<ToBf16>((float(bytes[pairs] & 15) - zero) * scale);
}

// out[i] = table[code] * scale, high nibble first.
template <bool ToBf16>
inline void decode_table_run(const uint8_t *codes, int64_t position, int64_t count, float scale, const float *table,
                             float *__restrict out) {
    if (count > 0 && (position & 1)) {
        *out++ = as_wanted<ToBf16>(table[nibble<true>(codes, position)] * scale);
        ++position, --count;
    }
    const uint8_t *bytes = codes + (position >> 1);
    int64_t i = 0;
#ifdef __AVX2__
    const __m256 scales = _mm256_set1_ps(scale), low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    const auto look_up = [&](__m256i index) {
        // Bit 3 of the code, moved to the sign, chooses the half of the table.
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        const __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
        return _mm256_mul_ps(_mm256_blendv_ps(a, b, upper), scales);
    };
    for (; i + 16 <= count && (!ToBf16 || is_finite(scale)); i += 16) {
        const __m128i q = sixteen_nibbles<true>(bytes + i / 2);
        store_wanted<ToBf16>(out + i, look_up(_mm256_cvtepu8_epi32(q)));
        store_wanted<ToBf16>(out + i + 8, look_up(_mm256_cvtepu8_epi32(_mm_srli_si128(q, 8))));
    }
#endif
    const int64_t pairs = count / 2;
    for (int64_t p = i / 2; p < pairs; ++p) {
        out[2 * p] = as_wanted<ToBf16>(table[bytes[p] >> 4] * scale);
        out[2 * p + 1] = as_wanted<ToBf16>(table[bytes[p] & 15] * scale);
    }
    if (count & 1) out[count - 1] = as_wanted<ToBf16>(table[bytes[pairs] >> 4] * scale);
}

template <bool ToBf16>
inline void decode_segment_as(const sh_weight &w, int64_t row, int64_t k0, int64_t count, float *out) {
    const bool int4 = w.format == SH_INT4;
    const uint8_t *codes = int4 ? w.codes + row * ceil_div(w.columns, 2) : w.codes;
    int64_t position = int4 ? k0 : row * w.columns + k0;
    int64_t block = position / w.group;
    int64_t border = (block + 1) * w.group;
    if (int4) block += row * groups_per_row(w);
    for (; count > 0; ++block, border += w.group) {
        const int64_t take = std::min(count, border - position);
        const float scale = sh_block_scale(w, block);
        if (int4)
            decode_int4_run<ToBf16>(codes, position, take, scale, sh_block_zero(w, block), out);
        else
            decode_table_run<ToBf16>(codes, position, take, scale, w.table, out);
        position += take, out += take, count -= take;
    }
}

// out[0 … count) = w[row][k0 … k0 + count), float32. Any k0 and count inside the row.
inline void decode_segment(const sh_weight &w, int64_t row, int64_t k0, int64_t count, float *out) {
    decode_segment_as<false>(w, row, k0, count, out);
}

// The same, each number then rounded to bfloat16 (and left in a float32).
inline void decode_segment_bf16(const sh_weight &w, int64_t row, int64_t k0, int64_t count, float *out) {
    decode_segment_as<true>(w, row, k0, count, out);
}

// SH_INT8: the 16 levels of a table as 8-bit integers; their factor 1/127 goes into the block's scale.
inline void table_levels(const float *table, int8_t *levels) {
    for (int i = 0; i < 16; ++i)
        levels[i] = int8_t(__builtin_nearbyintf(std::min(127.0f, std::max(-127.0f, table[i] * 127.0f))));
}
inline float sh_integer_scale(const sh_weight &w, int64_t block) {
    const float scale = sh_block_scale(w, block);
    return w.format == SH_INT4 ? scale : scale * (1.0f / 127.0f);
}

}  // namespace stillhouse::SH_NAMESPACE
