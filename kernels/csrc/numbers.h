// Half-precision numbers without hardware for them: bfloat16 and float16 to and from float32, alone and in runs.
//
// Rounding is to nearest even, NaN stays NaN. Nothing here passes through a subnormal float32, so the answers hold even where
// the caller has told the processor to flush those to zero.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "api.h"

#ifndef SH_NAMESPACE
#define SH_NAMESPACE portable
#endif

namespace stillhouse::SH_NAMESPACE {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// `condition ? yes : no` by a mask: the compiler keeps it free of branches, and does several numbers at once.
inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - uint32_t(condition);
    return (yes & mask) | (no & ~mask);
}

inline float bf16_to_f32(uint16_t half) { return bits_float(uint32_t(half) << 16); }

inline uint16_t f32_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0) : uint16_t(rounded);
}

inline float round_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return bits_float((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded);
}

inline float f16_to_f32(uint16_t half) {
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    const uint32_t sign = uint32_t(half & 0x8000u) << 16;
    const int32_t rest = half & 0x7fff;
    const uint32_t special = 0x7f800000u | choose((rest & 0x3ff) != 0, 0x400000u, 0u) | uint32_t(rest & 0x3ff) << 13;
    const uint32_t normal = uint32_t(rest << 13) + 0x38000000u, small = float_bits(float(rest) * 0x1p-24f);
    return bits_float(sign | choose(rest >= 0x7c00, special, choose(rest >= 0x400, normal, small)));
#endif
}

inline uint16_t f32_to_f16(float value) {
#ifdef __F16C__
    return uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u;
    const int32_t rest = int32_t(bits & 0x7fffffffu);
    const uint32_t normal = uint32_t(rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13;
    // A subnormal float16 counts in steps of 2^-24, which is the step of float32 just above 0.5: the addition rounds.
    const uint32_t small = float_bits(bits_float(uint32_t(rest)) + 0.5f) - 0x3f000000u;
    // 65520 and up round to infinity.
    const uint32_t finite = choose(rest >= 0x477ff000, 0x7c00u, choose(rest >= 0x38800000, normal, small));
    return uint16_t(sign | choose(rest > 0x7f800000, 0x7e00u, finite));
#endif
}

inline int64_t dtype_size(int32_t dtype) { return dtype == SH_F32 ? 4 : 2; }
inline bool dtype_known(int32_t dtype) { return dtype == SH_F32 || dtype == SH_BF16 || dtype == SH_F16; }

// out[i] = data[start + i] as float32.
inline void load_floats(const void *data, int32_t dtype, int64_t start, int64_t count, float *__restrict out) {
    if (dtype == SH_F32) {
        std::memcpy(out, static_cast<const float *>(data) + start, size_t(count) * 4);
        return;
    }
    const uint16_t *__restrict halves = static_cast<const uint16_t *>(data) + start;
    if (dtype == SH_BF16) {
        for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(halves[i]);
        return;
    }
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(halves + i))));
#endif
    for (; i < count; ++i) out[i] = f16_to_f32(halves[i]);
}

// data[start + i] = values[i], rounded once to `dtype`.
inline void store_floats(const float *__restrict values, int64_t count, void *data, int32_t dtype, int64_t start) {
    if (dtype == SH_F32) {
        std::memcpy(static_cast<float *>(data) + start, values, size_t(count) * 4);
        return;
    }
    uint16_t *__restrict halves = static_cast<uint16_t *>(data) + start;
    if (dtype == SH_BF16) {
        int64_t i = 0;
#ifdef __AVX2__
        const auto round = [&](const float *p) {
            const __m256 value = _mm256_loadu_ps(p);
            const __m256i bits = _mm256_castps_si256(value),
                          odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            const __m256i sum = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
            const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
            return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc0), nan);
        };
        for (; i + 16 <= count; i += 16) {
            // The pack works within 128 bits; the permutation puts its quarters in order.
            const __m256i packed = _mm256_packus_epi32(round(values + i), round(values + i + 8));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(halves + i), _mm256_permute4x64_epi64(packed, 0xd8));
        }
#endif
        for (; i < count; ++i) halves[i] = f32_to_bf16(values[i]);
        return;
    }
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(halves + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; ++i) halves[i] = f32_to_f16(values[i]);
}

}  // namespace stillhouse::SH_NAMESPACE
