// What the machine can do at most, through this library's own instructions: read bandwidth and multiply-adds a second.
#include <algorithm>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "portable.h"

namespace stillhouse::SH_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
typedef uint64_t Words __attribute__((vector_size(WIDTH), aligned(8), may_alias));
typedef float Floats __attribute__((vector_size(WIDTH)));

uint64_t read(const char *data, int64_t bytes) {
    constexpr int64_t STEP = 8 * WIDTH;
    Words a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{};
    int64_t i = 0;
    for (; i + STEP <= bytes; i += STEP) {
        const Words *p = reinterpret_cast<const Words *>(data + i);
        a ^= p[0], b ^= p[1], c ^= p[2], d ^= p[3], e ^= p[4], f ^= p[5], g ^= p[6], h ^= p[7];
    }
    const Words folded = ((a ^ b) ^ (c ^ d)) ^ ((e ^ f) ^ (g ^ h));
    uint64_t sum = 0;
    for (int lane = 0; lane < WIDTH / 8; ++lane) sum ^= folded[lane];
    for (; i < bytes; ++i) sum ^= uint64_t(uint8_t(data[i])) << (i % 8 * 8);
    return sum;
}

// ROUND names every accumulator by itself: an array of them would have to be unrolled completely to stay in registers. 12
// chains hide the latency of two units and leave 4 of 16 registers for the factors.
#define SH_TWELVE(ROUND) \
    ROUND(0) ROUND(1) ROUND(2) ROUND(3) ROUND(4) ROUND(5) ROUND(6) ROUND(7) ROUND(8) ROUND(9) ROUND(10) ROUND(11)

// An empty instruction that may change `v`: the loop's products cannot be computed once and for all.
#define SH_HIDE(v) asm volatile("" : "+x"(v))

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

double peak_f32(int64_t count, volatile float *sink) {
    Floats a = Floats{} + 0.5f, b = Floats{} + 0.25f;
#define SH_START(i) Floats c##i = Floats{} + float(i);
#define SH_STEP(i) c##i = multiply_add(c##i, a, b);
#define SH_SUM(i) total += c##i;
    SH_TWELVE(SH_START)
    for (int64_t i = 0; i < count; ++i) {
        SH_HIDE(a);
        SH_TWELVE(SH_STEP)
    }
    Floats total{};
    SH_TWELVE(SH_SUM)
#undef SH_START
#undef SH_STEP
#undef SH_SUM
    *sink = total[0];
    return 2.0 * 12 * (WIDTH / 4) * double(count);
}

#ifdef __AVX512BF16__
double peak_bf16(int64_t count, volatile float *sink) {
    __m512i bits = _mm512_set1_epi16(0x3f00);
    SH_HIDE(bits);
    const __m512bh a = (__m512bh)bits;
#define SH_START(i) __m512 c##i = _mm512_set1_ps(float(i));
#define SH_STEP(i)                       \
    c##i = _mm512_dpbf16_ps(c##i, a, a); \
    SH_HIDE(c##i);
#define SH_SUM(i) total = _mm512_add_ps(total, c##i);
    SH_TWELVE(SH_START)
    for (int64_t i = 0; i < count; ++i) {
        SH_TWELVE(SH_STEP)
    }
    __m512 total = _mm512_setzero_ps();
    SH_TWELVE(SH_SUM)
#undef SH_START
#undef SH_STEP
#undef SH_SUM
    *sink = total[0];
    return 2.0 * 12 * 32 * double(count);
}
#endif

#ifdef __AVX512VNNI__
double peak_int8(int64_t count, volatile float *sink) {
    __m512i a = _mm512_set1_epi8(1);
    SH_HIDE(a);
#define SH_START(i) __m512i c##i = _mm512_set1_epi32(i);
#define SH_STEP(i)                          \
    c##i = _mm512_dpbusd_epi32(c##i, a, a); \
    SH_HIDE(c##i);
#define SH_SUM(i) total = _mm512_add_epi32(total, c##i);
    SH_TWELVE(SH_START)
    for (int64_t i = 0; i < count; ++i) {
        SH_TWELVE(SH_STEP)
    }
    __m512i total = _mm512_setzero_si512();
    SH_TWELVE(SH_SUM)
#undef SH_START
#undef SH_STEP
#undef SH_SUM
    *sink = float(_mm512_cvtsi512_si32(total));
    return 2.0 * 12 * 64 * double(count);
}
#endif

double peak_one(int32_t kind, int64_t count) {
    volatile float sink;
    if (kind == 0) return peak_f32(count, &sink);
#ifdef __AVX512BF16__
    if (kind == 1) return peak_bf16(count, &sink);
#endif
#ifdef __AVX512VNNI__
    if (kind == 2) return peak_int8(count, &sink);
#endif
    return 0.0;
}

}  // namespace

uint64_t portable_read_bandwidth(const void *data, int64_t bytes, int32_t threads) {
    const int64_t team = std::max(threads, 1), part = (bytes / team + 4095) / 4096 * 4096;
    uint64_t sum = 0;
#pragma omp parallel for num_threads(int(team)) schedule(static, 1) reduction(^ : sum)
    for (int64_t t = 0; t < team; ++t) {
        const int64_t start = std::min(bytes, t * part), end = t + 1 == team ? bytes : std::min(bytes, start + part);
        sum ^= read(static_cast<const char *>(data) + start, end - start);
    }
    return sum;
}

double portable_peak(int32_t kind, int64_t count, int32_t threads) {
    const int team = std::max(threads, 1);
    double operations = 0.0;
#pragma omp parallel for num_threads(team) schedule(static, 1) reduction(+ : operations)
    for (int t = 0; t < team; ++t) operations += peak_one(kind, count);
    return operations;
}

}  // namespace stillhouse::SH_NAMESPACE
