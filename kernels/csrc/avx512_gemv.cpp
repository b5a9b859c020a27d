// Decode: a few rows of activations. The weight streams from memory once, in its canonical bytes, and everything
// else has to hide behind that stream.
//
// f32: 64 bytes of a row are 128 weights: dword lane l holds k = 8l ... 8l+7. Each nibble of every lane becomes a float where it
// stands and meets, in an fma, the activation that was put on that lane beforehand. The sum of a chunk is unscaled; its scales
// meet it in one more fma, since all 8 weights of a lane share one. Nothing is rounded, so the same loop serves bf16, f32
// and exact mode. About 28 instructions for 64 bytes: an int4 nibble is or-ed into the mantissa of a power of two that is
// subtracted again (no shuffle); a table's level is looked up by vpermps, which reads the low 4 bits of an index and no more.
//
// int8: the same bytes as two vectors of u8 (q & 15, q >> 4) against activations that were sorted into even and odd k; the
// zero point 8 enters as the accumulator's start, -8 sum(a). About 10 instructions for 64 bytes.
#include <type_traits>

#include "avx512.h"
#include "avx512_nested.h"
#include "avx512_quantize.h"

namespace stillhouse::avx512 {
namespace {

constexpr int ROWS = 4;  // weight rows at a time: independent chains, and x is loaded once for all
enum Kind { SYMMETRIC, ZERO_POINTS, TABLE };

thread_local Scratch packed_x, packed_scales, chunk_groups;

// Which of a row's scales go to which lanes of a chunk.
struct LaneScales {
    __m512i index;
    __mmask16 mask;
    const int32_t *offset;  // of each chunk: its first group
    LaneScales(int64_t group, int64_t chunks, int32_t *memory) : mask(first_lanes(group < CHUNK ? CHUNK / group : 1)), offset(memory) {
        alignas(64) int32_t lanes[16];
        for (int l = 0; l < 16; ++l) lanes[l] = group < CHUNK ? (int32_t)(8 * l / group) : 0;
        index = _mm512_load_si512(lanes);
        for (int64_t c = 0; c < chunks; ++c) memory[c] = (int32_t)(c * CHUNK / group);
    }
    // int4's scales straight from the weight: through memory of our own they would be read twice.
    __m512 at_f16(const uint16_t *scales, __mmask16 there) const {
        return _mm512_permutexvar_ps(index, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, scales)));
    }
    __m512 at(const float *scales) const { return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(mask, scales)); }
};

// The 8 levels of each lane of a chunk, nibble by nibble.
template <Kind K>
struct Levels {
    __m512 table;
    __m512i mask[4], power[4];
    __m512 minus[4];
    explicit Levels(const Weight &w) : table(levels(w)) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // with 2^(23-4i) above it, the nibble at bit 4i counts as q
            const float base = (float)(1 << (23 - 4 * i));
            mask[i] = _mm512_set1_epi32(15 << 4 * i);
            power[i] = _mm512_castps_si512(_mm512_set1_ps(base));
            minus[i] = _mm512_set1_ps(base + (K == SYMMETRIC ? 8.0f : 0.0f));
        }
    }
    // `zero` is each lane's zero point: 2^(23-4i) + z has a place in f32, so that q - z comes out exact in one subtraction.
    template <int I>
    __m512 at(__m512i v, __m512i shifted16, __m512 zero) const {
        if (K == TABLE) return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * I), table);
        const __m512i bits = _mm512_ternarylogic_epi32(I < 4 ? v : shifted16, mask[I % 4], power[I % 4], 0xea);  // (v & mask) | power
        const __m512 base = K == ZERO_POINTS ? _mm512_add_ps(minus[I % 4], zero) : minus[I % 4];
        return _mm512_sub_ps(_mm512_castsi512_ps(bits), base);
    }
};

// The 1 to 63 bytes of a row's last, partial chunk.
inline __m512i tail_codes(const uint8_t *p, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), p);
}

// Activations on the lanes of their weights: [chunk][nibble][16].
void pack_x(const Weight &w, const void *x, int32_t dtype, int64_t chunks, float *out) {
    const int64_t k_size = w.columns;
    const int flip = w.format == SH_INT4 ? 0 : 1;  // there the high nibble is the even element
    for (int64_t c = 0; c < chunks; ++c) {
        alignas(64) float part[CHUNK];
        for (int i = 0; i < 8; ++i) {
            const int64_t k = c * CHUNK + 16 * i;
            _mm512_store_ps(part + 16 * i, load_f32(x, dtype, k, first_lanes(k_size - k)));
        }
        const __m512i lane = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(8));
        for (int i = 0; i < 8; ++i) {
            const __m512 v = _mm512_i32gather_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(i ^ flip)), part, 4);
            _mm512_store_ps(out + (c * 8 + i) * 16, v);
        }
    }
}

// bf16 activations for rows_bf16: [chunk][nibble][32], word j of nibble i being x[4j + i].
void pack_bf16(const uint16_t *x, int64_t columns, int64_t chunks, uint16_t *out) {
    alignas(64) uint16_t index[64];
    for (int j = 0; j < 32; ++j) index[j] = (uint16_t)(4 * (j % 16));
    const __m512i base = _mm512_load_si512(index);
    for (int64_t c = 0; c < chunks; ++c) {
        __m512i v[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t left = columns - c * CHUNK - 32 * i;
            v[i] = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1, x + c * CHUNK + 32 * i);
        }
        for (int i = 0; i < 4; ++i) {
            const __m512i at = _mm512_add_epi16(base, _mm512_set1_epi16((short)i));
            const __m512i low = _mm512_permutex2var_epi16(v[0], at, v[1]), high = _mm512_permutex2var_epi16(v[2], at, v[3]);
            const __m512i word = _mm512_mask_blend_epi32(0xff00, low, high);
            _mm512_store_si512(out + c * CHUNK + 32 * i, word);
        }
    }
}

// What the loops start with: where the rows' codes are, and their scales in f32.
//
// The next rows' scales are asked for here: they are a stream of their own, and a burst of misses at the start of every 4 rows.
void open_rows(const Weight &w, const NestedTable &nested, int64_t row, int rows, float *scales, float *zeros, int64_t stride, const uint8_t **codes) {
    const int64_t size = w.format == SH_INT4 ? 2 : w.absmax ? 4 : 1;
    const char *own = w.format == SH_INT4 ? (const char *)w.scales : w.absmax ? (const char *)w.absmax : (const char *)w.nested_codes;
    for (int64_t at = (row + 2 * ROWS) * w.groups * size; at < (row + 3 * ROWS) * w.groups * size; at += 64) _mm_prefetch(own + at, _MM_HINT_T0);
    for (int r = 0; r < ROWS; ++r) {
        const int64_t n = row + std::min(r, rows - 1);
        codes[r] = w.row_codes(n);
        if (w.format != SH_INT4) nested.row_scales(w, n, scales + r * stride);
        if (w.zero_points) row_zeros(w, n, 0, w.groups, zeros + r * stride);
    }
}

template <int M, Kind K>
void rows_f32(const Weight &w, const uint8_t *const *codes, const float *const *x, int64_t chunks,
              const LaneScales &lanes_at, const uint16_t *const *half, const float *scales, const float *zeros, int64_t stride, float (*out)[M]) {
    const int64_t ahead = std::max<int64_t>(ROWS * w.row_bytes, 2048);
    const LaneScales lanes = lanes_at;
    const Levels<K> levels(w);
    __m512 acc[ROWS][M];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
    const auto chunk = [&](int64_t c, __mmask16 there, auto load) __attribute__((always_inline)) {
        const int32_t group = lanes.offset[c];
        __m512i v[ROWS], shifted[ROWS];
        __m512 sum[ROWS][M], zero[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            v[r] = load(codes[r] + c * 64);
            _mm_prefetch((const char *)codes[r] + c * 64 + ahead, _MM_HINT_NTA);
            shifted[r] = _mm512_srli_epi32(v[r], 16);
            zero[r] = K == ZERO_POINTS ? lanes.at(zeros + r * stride + group) : _mm512_setzero_ps();
        }
        const auto nibble = [&](auto index) __attribute__((always_inline)) {
            constexpr int I = decltype(index)::value;
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m512 level = levels.template at<I>(v[r], shifted[r], zero[r]);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    const __m512 xv = _mm512_load_ps(x[m] + (c * 8 + I) * 16);
                    sum[r][m] = I == 0 ? _mm512_mul_ps(level, xv) : _mm512_fmadd_ps(level, xv, sum[r][m]);
                }
            }
        };
        nibble(std::integral_constant<int, 0>{}), nibble(std::integral_constant<int, 1>{});
        nibble(std::integral_constant<int, 2>{}), nibble(std::integral_constant<int, 3>{});
        nibble(std::integral_constant<int, 4>{}), nibble(std::integral_constant<int, 5>{});
        nibble(std::integral_constant<int, 6>{}), nibble(std::integral_constant<int, 7>{});
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512 scale = (K == TABLE ? lanes.at(scales + r * stride + group) : lanes.at_f16(half[r] + group, there));
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) acc[r][m] = _mm512_fmadd_ps(sum[r][m], scale, acc[r][m]);
        }
    };
    const int64_t whole = w.row_bytes / 64;
    for (int64_t c = 0; c < whole; ++c) chunk(c, lanes.mask, [](const uint8_t *p) { return _mm512_loadu_si512(p); });
    if (whole < chunks) chunk(whole, lanes.mask & first_lanes(w.groups - lanes.offset[whole]), [&](const uint8_t *p) { return tail_codes(p, w.row_bytes - whole * 64); });
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(acc[r][m]);
}

// Symmetric int4 levels are exact in bf16, so bf16 activations take half the instructions: vpermw looks up 32 levels (an index's fifth
// bit meets a table that holds the 16 twice), vdpbf16ps multiplies two by two. Products are exact, sums are f32.
template <int M>
void rows_bf16(const Weight &w, const uint8_t *const *codes, const uint16_t *const *x, int64_t chunks,
               const LaneScales &lanes_at, const uint16_t *const *half, float (*out)[M]) {
    const int64_t ahead = std::max<int64_t>(ROWS * w.row_bytes, 2048);
    const LaneScales lanes = lanes_at;
    const __m256i once = (__m256i)_mm512_cvtneps_pbh(levels(w));
    const __m512i table = _mm512_broadcast_i64x4(once);
    __m512 acc[ROWS][M];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
    const auto chunk = [&](int64_t c, __mmask16 there, auto load) __attribute__((always_inline)) {
        const int32_t group = lanes.offset[c];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512i v = load(codes[r] + c * 64);
            _mm_prefetch((const char *)codes[r] + c * 64 + ahead, _MM_HINT_NTA);
            __m512 sum[M];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i level = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4 * i), table);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m)
                    sum[m] = _mm512_dpbf16_ps(i ? sum[m] : _mm512_setzero_ps(), (__m512bh)level, (__m512bh)_mm512_load_si512(x[m] + c * CHUNK + 32 * i));
            }
            const __m512 scale = lanes.at_f16(half[r] + group, there);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) acc[r][m] = _mm512_fmadd_ps(sum[m], scale, acc[r][m]);
        }
    };
    const int64_t whole = w.row_bytes / 64;
    for (int64_t c = 0; c < whole; ++c) chunk(c, lanes.mask, [](const uint8_t *p) { return _mm512_loadu_si512(p); });
    if (whole < chunks) chunk(whole, lanes.mask & first_lanes(w.groups - lanes.offset[whole]), [&](const uint8_t *p) { return tail_codes(p, w.row_bytes - whole * 64); });
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(acc[r][m]);
}

template <int M, Kind K>
void rows_int8(const Weight &w, const uint8_t *const *codes, const int8_t *const *a, const int32_t *const *start, const float *const *scale_a,
               int64_t chunks, const LaneScales &lanes_at, const uint16_t *const *half, const float *scales, const float *zeros, int64_t stride, float (*out)[M]) {
    const int64_t ahead = std::max<int64_t>(ROWS * w.row_bytes, 2048);
    const LaneScales lanes = lanes_at;
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i table = K == TABLE ? levels_u8(w.table) : _mm512_setzero_si512();
    const __m512 unit = _mm512_set1_ps(1.0f / 127.0f);
    __m512 acc[ROWS][M];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
    const auto chunk = [&](int64_t c, __mmask16 there, auto load) __attribute__((always_inline)) {
        const int32_t group = lanes.offset[c];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512i v = load(codes[r] + c * 64);
            _mm_prefetch((const char *)codes[r] + c * 64 + ahead, _MM_HINT_NTA);
            __m512i first = _mm512_and_si512(v, low), second = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
            if (K == TABLE) {  // there the high nibble is the even element
                const __m512i odd = _mm512_shuffle_epi8(table, first);
                first = _mm512_shuffle_epi8(table, second);
                second = odd;
            }
            __m512 scale = (K == TABLE ? lanes.at(scales + r * stride + group) : lanes.at_f16(half[r] + group, there));
            if (K == TABLE) scale = _mm512_mul_ps(scale, unit);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const __m512i begin = _mm512_load_si512(start[m] + c * 16);
                __m512i sum = K == ZERO_POINTS ? _mm512_setzero_si512() : begin;
                sum = _mm512_dpbusd_epi32(sum, first, _mm512_load_si512(a[m] + c * CHUNK));
                sum = _mm512_dpbusd_epi32(sum, second, _mm512_load_si512(a[m] + c * CHUNK + 64));
                __m512 value = _mm512_cvtepi32_ps(sum);
                if (K == ZERO_POINTS) {  // start holds -8 sum(a)
                    const __m512 minus = _mm512_mul_ps(_mm512_cvtepi32_ps(begin), _mm512_set1_ps(0.125f));
                    value = _mm512_fmadd_ps(lanes.at(zeros + r * stride + group), minus, value);
                }
                acc[r][m] = _mm512_fmadd_ps(_mm512_mul_ps(value, scale), _mm512_load_ps(scale_a[m] + c * 16), acc[r][m]);
            }
        }
    };
    const int64_t whole = w.row_bytes / 64;
    for (int64_t c = 0; c < whole; ++c) chunk(c, lanes.mask, [](const uint8_t *p) { return _mm512_loadu_si512(p); });
    if (whole < chunks) chunk(whole, lanes.mask & first_lanes(w.groups - lanes.offset[whole]), [&](const uint8_t *p) { return tail_codes(p, w.row_bytes - whole * 64); });
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(acc[r][m]);
}

// Activations of all rows as one of the two loops wants them, and where each row's parts lie.
struct Packed {
    int64_t chunks, bytes_per_row;
    char *memory;
    Packed(int64_t k, char *at) : chunks(ceil_div(k, CHUNK)), bytes_per_row(size(k)), memory(at) {}
    static int64_t size(int64_t k) { return ceil_div(k, CHUNK) * CHUNK * 4; }
    char *own(int64_t m) const { return memory + m * bytes_per_row; }
    float *f32(int64_t m) const { return (float *)own(m); }
    int8_t *int8(int64_t m) const { return (int8_t *)own(m); }
    int32_t *start(int64_t m) const { return (int32_t *)(own(m) + chunks * CHUNK); }
    float *scales(int64_t m) const { return (float *)start(m) + chunks * 16; }
};

struct Call {
    const Weight &w;
    const void *x, *bias;
    void *y;
    int32_t dtype, bias_dtype;
    bool int8;
    bool bf16() const { return !int8 && dtype == SH_BF16 && w.format == SH_INT4 && !w.zero_points; }
};

// 4 rows of the weight times M rows of activations, written out.
template <int M, Kind K>
void block(const Call &call, const Packed &packed, const LaneScales &lanes, const uint8_t *const *codes, const uint16_t *const *half, const float *scales, int64_t stride, int64_t n, int64_t m0) {
    const Weight &w = call.w;
    const float *zeros = scales + ROWS * stride;
    float out[ROWS][M];
    if (call.int8) {
        const int8_t *a[M];
        const int32_t *start[M];
        const float *scales_a[M];
        for (int m = 0; m < M; ++m) a[m] = packed.int8(m0 + m), start[m] = packed.start(m0 + m), scales_a[m] = packed.scales(m0 + m);
        rows_int8<M, K>(w, codes, a, start, scales_a, packed.chunks, lanes, half, scales, zeros, stride, out);
    } else if (K == SYMMETRIC && call.bf16()) {
        const uint16_t *x[M];
        for (int m = 0; m < M; ++m) x[m] = (const uint16_t *)packed.own(m0 + m);
        rows_bf16<M>(w, codes, x, packed.chunks, lanes, half, out);
    } else {
        const float *x[M];
        for (int m = 0; m < M; ++m) x[m] = packed.f32(m0 + m);
        rows_f32<M, K>(w, codes, x, packed.chunks, lanes, half, scales, zeros, stride, out);
    }
    const int rows = (int)std::min<int64_t>(ROWS, w.rows - n);
    for (int r = 0; r < rows; ++r)
        for (int m = 0; m < M; ++m) {
            const float value = out[r][m] + (call.bias ? scalar_f32(call.bias, call.bias_dtype, n + r) : 0.0f);
            store_f32(call.y, call.dtype, (m0 + m) * w.rows + n + r, 1, _mm512_set1_ps(value));
        }
}

template <Kind K>
void four_rows(const Call &call, const Packed &packed, const LaneScales &lanes, const NestedTable &nested, float *scales, int64_t stride, int64_t n, int64_t m) {
    const uint8_t *codes[ROWS];
    const uint16_t *half[ROWS];
    for (int r = 0; r < ROWS; ++r) half[r] = call.w.scales ? call.w.scales + std::min(n + r, call.w.rows - 1) * call.w.groups : nullptr;
    open_rows(call.w, nested, n, (int)std::min<int64_t>(ROWS, call.w.rows - n), scales, scales + ROWS * stride, stride, codes);
    int64_t i = 0;
    for (; m - i >= 4; i += 4) block<4, K>(call, packed, lanes, codes, half, scales, stride, n, i);  // the rows stay in the L1 cache
    if (m - i == 3) block<3, K>(call, packed, lanes, codes, half, scales, stride, n, i);
    if (m - i == 2) block<2, K>(call, packed, lanes, codes, half, scales, stride, n, i);
    if (m - i == 1) block<1, K>(call, packed, lanes, codes, half, scales, stride, n, i);
}

int32_t run(const Call &call, int64_t m, int threads) {
    const Weight &w = call.w;
    const int64_t chunks = ceil_div(w.columns, CHUNK), stride = w.groups + 16, quads = ceil_div(w.rows, ROWS);
    bool failed = false;
#pragma omp parallel num_threads(team(threads, w.rows * w.row_bytes, m)) reduction(|| : failed)
    {
        // Each thread sorts the activations for itself: some microseconds, and no barrier.
        char *memory = (char *)packed_x.get(m * Packed::size(w.columns));
        float *scales = (float *)packed_scales.get(2 * ROWS * stride * sizeof(float));
        int32_t *groups = (int32_t *)chunk_groups.get(chunks * sizeof(int32_t));
        if (!memory || !scales || !groups) {
            failed = true;
        } else {
            std::memset(scales, 0, 2 * ROWS * stride * sizeof(float));
            const LaneScales lanes(w.group, chunks, groups);
            const NestedTable nested(w);
            const Packed packed(w.columns, memory);
            for (int64_t i = 0; i < m; ++i) {
                const char *row = (const char *)call.x + i * w.columns * (call.dtype == SH_F32 ? 4 : 2);
                if (call.int8) {
                    quantize_row_lanes(row, call.dtype, w.columns, chunks, w.format == SH_INT4 ? 8 : 127, packed.int8(i), packed.start(i), packed.scales(i));
                } else if (call.bf16()) {
                    pack_bf16((const uint16_t *)row, w.columns, chunks, (uint16_t *)packed.own(i));
                } else {
                    pack_x(w, row, call.dtype, chunks, packed.f32(i));
                }
            }
            const auto rows = w.format != SH_INT4 ? four_rows<TABLE> : w.zero_points ? four_rows<ZERO_POINTS> : four_rows<SYMMETRIC>;
            const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
            for (int64_t q = quads * me / all; q < quads * (me + 1) / all; ++q) rows(call, packed, lanes, nested, scales, stride, q * ROWS, m);
        }
    }
    return failed ? SH_NO_MEMORY : SH_OK;
}

}  // namespace

int32_t gemv(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, int threads) {
    return run({w, x, bias, y, dtype, bias_dtype, false}, m, threads);
}
int32_t gemv_int8(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, int threads) {
    return run({w, x, bias, y, dtype, bias_dtype, true}, m, threads);
}

}  // namespace stillhouse::avx512
