// Prefill with activations in 8 bits: vdpbusd does four multiply-adds a lane, twice what bf16 does.
//
// The price is the scales: after each 32 along K the integer sums become f32 and meet the scale of the weight and that of the
// activations: 3 instructions for each 8 of vdpbusd. So the tile is 3 x 4, that both kinds of accumulators fit the registers.
#include "avx512.h"
#include "avx512_panels.h"

namespace stillhouse::avx512 {
namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t INT8_ROWS = 3;   // 12 integer and 12 f32 accumulators
constexpr int64_t SUM_ROWS = 512;   // rows of activations at a time

thread_local Scratch panels, sums, scale_memory;

struct Activations {
    const int8_t *a;       // [m][blocks * 32], octets sorted as quantize_row_octets does
    const int32_t *start;  // [m][blocks]: -offset sum(a)
    const float *scales;   // [m][blocks]
    int64_t blocks;
};

// c[R][64] += the product over blocks [b0, b0 + count) of the panel.
template <int R, bool ZERO>
void tile(const Activations &x, int64_t row, int64_t b0, int64_t count, const uint8_t *panel, const float *scales, const float *zeros, float *c) {
    const int64_t stride = x.blocks * BLOCK;
    const int8_t *a = x.a + row * stride + b0 * BLOCK;
    const int32_t *start = x.start + row * x.blocks + b0;
    const float *scales_a = x.scales + row * x.blocks + b0;
    __m512 sum[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sum[r][q] = _mm512_load_ps(c + r * TILE + 16 * q);
    for (int64_t b = 0; b < count; ++b) {
        __m512i acc[R][4];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i first = ZERO ? _mm512_setzero_si512() : _mm512_set1_epi32(start[r * x.blocks + b]);
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) acc[r][q] = first;
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const uint8_t *p = panel + (b * 8 + i) * 4 * TILE;
            const __m512i w0 = _mm512_load_si512(p), w1 = _mm512_load_si512(p + 64), w2 = _mm512_load_si512(p + 128), w3 = _mm512_load_si512(p + 192);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                int32_t quad;
                std::memcpy(&quad, a + r * stride + b * BLOCK + 4 * i, 4);
                const __m512i v = _mm512_set1_epi32(quad);
                acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, v);
                acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, v);
                acc[r][2] = _mm512_dpbusd_epi32(acc[r][2], w2, v);
                acc[r][3] = _mm512_dpbusd_epi32(acc[r][3], w3, v);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512 scale_a = _mm512_set1_ps(scales_a[r * x.blocks + b]);
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
                __m512 value = _mm512_cvtepi32_ps(acc[r][q]);
                if (ZERO) value = _mm512_fmadd_ps(_mm512_load_ps(zeros + b * TILE + 16 * q), _mm512_set1_ps(0.125f * start[r * x.blocks + b]), value);
                sum[r][q] = _mm512_fmadd_ps(_mm512_mul_ps(value, _mm512_load_ps(scales + b * TILE + 16 * q)), scale_a, sum[r][q]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) _mm512_store_ps(c + r * TILE + 16 * q, sum[r][q]);
}

template <bool ZERO>
void any_tile(int64_t rows, const Activations &x, int64_t row, int64_t b0, int64_t count, const uint8_t *panel, const float *scales, const float *zeros, float *c) {
    switch (rows) {
        case 1: return tile<1, ZERO>(x, row, b0, count, panel, scales, zeros, c);
        case 2: return tile<2, ZERO>(x, row, b0, count, panel, scales, zeros, c);
        default: return tile<3, ZERO>(x, row, b0, count, panel, scales, zeros, c);
    }
}

// Scales of 64 rows for `count` blocks of 32 from block b0 on: a group of more than 32 is repeated.
void block_scales(const Weight &w, int64_t n, int64_t b0, int64_t count, float *scales, float *zeros, float *groups) {
    const int64_t first = b0 * BLOCK / w.group, last = ((b0 + count) * BLOCK - 1) / w.group;
    const int64_t all = w.groups, number = std::min(last, all - 1) - first + 1;
    float *group_zeros = groups + (INT8_PANEL_DEPTH / BLOCK + 1) * TILE;
    scale_panel(w, n, first, number, groups, group_zeros);
    const __m512 unit = _mm512_set1_ps(w.format == SH_INT4 ? 1.0f : 1.0f / 127.0f);
    for (int64_t b = 0; b < count; ++b) {
        const int64_t g = (b0 + b) * BLOCK / w.group - first;
        for (int64_t q = 0; q < TILE; q += 16) {
            _mm512_store_ps(scales + b * TILE + q, _mm512_mul_ps(_mm512_load_ps(groups + g * TILE + q), unit));
            if (w.zero_points) _mm512_store_ps(zeros + b * TILE + q, _mm512_load_ps(group_zeros + g * TILE + q));
        }
    }
}

bool column_tile(const Weight &w, const Activations &x, const void *bias, int32_t bias_dtype, void *y, int32_t dtype, int64_t column, int64_t m0, int64_t rows) {
    const int64_t most = INT8_PANEL_DEPTH / BLOCK;
    uint8_t *panel = (uint8_t *)panels.get(INT8_PANEL_DEPTH * TILE + 64 * 64);
    float *c = (float *)sums.get(ceil_div(rows, INT8_ROWS) * INT8_ROWS * TILE * 4);
    float *scales = (float *)scale_memory.get((2 * most + 2 * (most + 1)) * TILE * 4);
    if (!panel || !c || !scales) return false;
    float *zeros = scales + most * TILE, *groups = zeros + most * TILE;
    std::memset(c, 0, rows * TILE * 4);
    for (int64_t b0 = 0; b0 < x.blocks; b0 += most) {
        const int64_t count = std::min(most, x.blocks - b0);
        block_scales(w, column, b0, count, scales, zeros, groups);
        // Beyond the weight's last column the activations are 0, whatever the panel holds.
        forward_panel_u8(w, column, b0 * BLOCK, count * BLOCK, panel);
        for (int64_t r = 0; r < rows; r += INT8_ROWS) {
            const int64_t here = std::min<int64_t>(INT8_ROWS, rows - r);
            if (w.zero_points) {
                any_tile<true>(here, x, m0 + r, b0, count, panel, scales, zeros, c + r * TILE);
            } else {
                any_tile<false>(here, x, m0 + r, b0, count, panel, scales, zeros, c + r * TILE);
            }
        }
    }
    store_tile(c, rows, bias, bias_dtype, y, dtype, w.rows, column, m0);
    return true;
}

}  // namespace

int32_t gemm_int8(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, int threads) {
    const int64_t blocks = ceil_div(w.columns, BLOCK), tiles = ceil_div(w.rows, TILE);
    const int64_t per_row = blocks * (BLOCK + 4 + 4), rows_at_once = std::min(m, SUM_ROWS);
    std::unique_ptr<void, Scratch::Free> memory(std::aligned_alloc(64, (rows_at_once * per_row + 63) / 64 * 64));
    if (!memory) return SH_NO_MEMORY;
    int8_t *a = (int8_t *)memory.get();
    int32_t *start = (int32_t *)(a + rows_at_once * blocks * BLOCK);
    float *scales = (float *)(start + rows_at_once * blocks);
    const Activations activations{a, start, scales, blocks};
    const int64_t element = dtype == SH_F32 ? 4 : 2;
    bool failed = false;
    for (int64_t m0 = 0; m0 < m; m0 += rows_at_once) {
        const int64_t rows = std::min(rows_at_once, m - m0);
        const char *xs = (const char *)x + m0 * w.columns * element;
        char *ys = (char *)y + m0 * w.rows * element;
        const int64_t part = rows_a_part(rows, SUM_ROWS, tiles, threads, INT8_ROWS), parts = ceil_div(rows, part);
#pragma omp parallel num_threads(team(threads, w.rows * w.row_bytes, rows)) reduction(|| : failed)
        {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; ++r)
                quantize_row_octets(xs + r * w.columns * element, dtype, w.columns, blocks, w.format == SH_INT4 ? 8 : 127,
                                    a + r * blocks * BLOCK, start + r * blocks, scales + r * blocks);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tiles * parts; ++i) {
                const int64_t first = i / tiles * part;
                failed = failed || !column_tile(w, activations, bias, bias_dtype, ys, dtype, i % tiles * TILE, first, std::min(part, rows - first));
            }
        }
    }
    return failed ? SH_NO_MEMORY : SH_OK;
}

}  // namespace stillhouse::avx512
