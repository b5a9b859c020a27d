// Prefill and training: panels of the weight are decoded once for many rows of activations.
//
// One register tile serves forward and backward: MAX_ROWS rows of activations, broadcast straight from where they lie, times a panel
// of 64 columns: 24 accumulators, 24 multiply-adds for 10 loads. bf16 takes two of the reduced dimension a step (vdpbf16ps), f32 one.
// The panel is 32 KiB and stays in the L1 cache while every row of activations passes over it; sums across
// panels wait in f32. Scratch is the panel and those sums: under 0.5 MiB a thread, whatever the size of the weight.
#include "avx512.h"
#include "avx512_panels.h"

namespace stillhouse::avx512 {
namespace {

constexpr int64_t SUM_ROWS = 512;  // rows of activations whose sums wait at a time: 128 KiB forward, 256 backward

thread_local Scratch panels, sums, scale_memory;

// c[R][64] (+)= a[R][size] @ panel[size][64]. a: rows of bf16 or f32, `stride` elements apart.
template <bool BF16, int R>
void tile(const void *a, int64_t stride, const void *panel, int64_t size, float *c, bool add) {
    __m512 acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) acc[r][q] = add ? _mm512_load_ps(c + r * TILE + 16 * q) : _mm512_setzero_ps();
    if (BF16) {
        const uint16_t *x = (const uint16_t *)a;
        const int32_t *p = (const int32_t *)panel;
        const int64_t pairs = size / 2;
        for (int64_t i = 0; i < pairs; ++i, p += TILE) {
            const __m512bh b0 = (__m512bh)_mm512_load_si512(p), b1 = (__m512bh)_mm512_load_si512(p + 16);
            const __m512bh b2 = (__m512bh)_mm512_load_si512(p + 32), b3 = (__m512bh)_mm512_load_si512(p + 48);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                int32_t both;
                std::memcpy(&both, x + r * stride + 2 * i, 4);
                const __m512bh v = (__m512bh)_mm512_set1_epi32(both);
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], v, b0);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], v, b1);
                acc[r][2] = _mm512_dpbf16_ps(acc[r][2], v, b2);
                acc[r][3] = _mm512_dpbf16_ps(acc[r][3], v, b3);
            }
        }
        if (size % 2) {  // the last of an odd number: its partner in the panel meets a zero
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512bh v = (__m512bh)_mm512_set1_epi32(x[r * stride + size - 1]);
#pragma GCC unroll 4
                for (int q = 0; q < 4; ++q) acc[r][q] = _mm512_dpbf16_ps(acc[r][q], v, (__m512bh)_mm512_load_si512(p + 16 * q));
            }
        }
    } else {
        const float *x = (const float *)a, *p = (const float *)panel;
        for (int64_t i = 0; i < size; ++i, p += TILE) {
            const __m512 b0 = _mm512_load_ps(p), b1 = _mm512_load_ps(p + 16), b2 = _mm512_load_ps(p + 32), b3 = _mm512_load_ps(p + 48);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512 v = _mm512_set1_ps(x[r * stride + i]);
                acc[r][0] = _mm512_fmadd_ps(v, b0, acc[r][0]);
                acc[r][1] = _mm512_fmadd_ps(v, b1, acc[r][1]);
                acc[r][2] = _mm512_fmadd_ps(v, b2, acc[r][2]);
                acc[r][3] = _mm512_fmadd_ps(v, b3, acc[r][3]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) _mm512_store_ps(c + r * TILE + 16 * q, acc[r][q]);
}

template <bool BF16>
void any_tile(int64_t rows, const void *a, int64_t stride, const void *panel, int64_t size, float *c, bool add) {
    switch (rows) {
        case 1: return tile<BF16, 1>(a, stride, panel, size, c, add);
        case 2: return tile<BF16, 2>(a, stride, panel, size, c, add);
        case 3: return tile<BF16, 3>(a, stride, panel, size, c, add);
        case 4: return tile<BF16, 4>(a, stride, panel, size, c, add);
        case 5: return tile<BF16, 5>(a, stride, panel, size, c, add);
        default: return tile<BF16, 6>(a, stride, panel, size, c, add);
    }
}

struct Product {
    const Weight &w;
    const void *a;  // activations or gradients, [m][reduced]
    const void *bias;
    int32_t bias_dtype;
    void *out;  // [m][width]
    int32_t dtype;
    int64_t m, width, reduced;
    bool backward;
};

// One tile of columns (64, or 128 as two halves) for `rows` rows of activations from row m0 on.
template <bool BF16>
bool column_tile(const Product &p, int64_t column, int64_t wide, int64_t m0, int64_t rows) {
    const int64_t halves = wide > TILE && column + TILE < p.width ? 2 : 1, element = BF16 ? 2 : 4;
    const int64_t depth = PANEL_DEPTH<BF16> / (p.backward ? 2 : 1), half = depth * TILE / (BF16 ? 2 : 1);
    int32_t *panel = (int32_t *)panels.get((PANEL_DEPTH<BF16> + 8) * TILE * 4);
    const int64_t c_rows = ceil_div(rows, MAX_ROWS) * MAX_ROWS;
    float *c = (float *)sums.get(halves * c_rows * TILE * 4);
    const int64_t most = PANEL_DEPTH<BF16> / std::min<int64_t>(p.w.group, PANEL_DEPTH<BF16>) + 1;
    float *scales = (float *)scale_memory.get(2 * most * TILE * 4);
    if (!panel || !c || !scales) return false;
    const char *a = (const char *)p.a + m0 * p.reduced * element;
    for (int64_t k0 = 0; k0 < p.reduced; k0 += depth) {
        const int64_t size = std::min(depth, p.reduced - k0);
        if (p.backward) {
            (halves == 2 ? backward_panel<BF16, 2> : backward_panel<BF16, 1>)(p.w, column, k0, size, panel, half);
        } else {
            const int64_t first = k0 / p.w.group, last = (k0 + size - 1) / p.w.group;
            scale_panel(p.w, column, first, last - first + 1, scales, scales + most * TILE);
            forward_panel<BF16>(p.w, column, k0, size, scales, scales + most * TILE, panel);
        }
        for (int64_t r = 0; r < rows; r += MAX_ROWS)
            for (int64_t h = 0; h < halves; ++h)
                any_tile<BF16>(std::min<int64_t>(MAX_ROWS, rows - r), a + (r * p.reduced + k0) * element, p.reduced, panel + h * half, size,
                               c + (h * c_rows + r) * TILE, k0 > 0);
    }
    for (int64_t h = 0; h < halves; ++h) store_tile(c + h * c_rows * TILE, rows, p.bias, p.bias_dtype, p.out, p.dtype, p.width, column + h * TILE, m0);
    return true;
}

template <bool BF16>
int32_t run(const Product &p, int threads) {
    // Backward tiles are whole cache lines of codes, unless a thread would have a tile more than another: then half lines.
    threads = std::max(threads, 1);
    const int64_t lines = ceil_div(p.width, 2 * TILE);
    const int64_t wide = p.backward && (lines % threads == 0 || lines >= 8 * threads) ? 2 * TILE : TILE, tiles = ceil_div(p.width, wide);
    const int64_t part = rows_a_part(p.m, SUM_ROWS, tiles, threads, MAX_ROWS), parts = ceil_div(p.m, part);
    bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team(threads, p.width * p.reduced / 2, p.m)) reduction(|| : failed)
    for (int64_t i = 0; i < tiles * parts; ++i) {
        const int64_t m0 = i / tiles * part;
        failed = failed || !column_tile<BF16>(p, i % tiles * wide, wide, m0, std::min(part, p.m - m0));
    }
    return failed ? SH_NO_MEMORY : SH_OK;
}

// bf16 operands in exact mode are widened first: the product then is the f32 one, and only its result is bf16.
int32_t exact_bf16(Product p, int threads) {
    const int64_t count = p.m * p.reduced;
    std::unique_ptr<void, Scratch::Free> wide(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64));
    if (!wide) return SH_NO_MEMORY;
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        _mm512_mask_storeu_ps((float *)wide.get() + i, mask, load_f32(p.a, SH_BF16, i, mask));
    }
    p.a = wide.get();
    return run<false>(p, threads);
}

int32_t multiply(const Product &p, bool exact, int threads) {
    if (p.dtype == SH_F32) return run<false>(p, threads);
    return exact ? exact_bf16(p, threads) : run<true>(p, threads);
}

}  // namespace

int32_t gemm_forward(const Weight &w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, bool exact, int threads) {
    return multiply({w, x, bias, bias_dtype, y, dtype, m, w.rows, w.columns, false}, exact, threads);
}

int32_t gemm_backward(const Weight &w, const void *dy, int32_t dtype, void *dx, int64_t m, bool exact, int threads) {
    return multiply({w, dy, nullptr, SH_F32, dx, dtype, m, w.columns, w.rows, true}, exact, threads);
}

}  // namespace stillhouse::avx512
