// Products of float32 with a packed weight, forward and backward, decoded a panel at a time in the caches.
//
// Forward is a matrix of dot products: rows of x and decoded rows of w both run along K, so a panel needs no transposition.
// Each output is summed in one fixed order (lanes along 512 columns, then their tree, then the 512s in turn), whatever M, the
// tile or the number of threads: a row of a batch gives the same bits as that row alone. Backward adds decoded rows of w into
// vectors along K, in order of n, and has the same property. Scratch: under 600 KB a thread.
#include <algorithm>

#include "decode.h"
#include "portable.h"

namespace stillhouse::SH_NAMESPACE {
namespace {

#ifdef __AVX2__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Loaded __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float *p) { return *reinterpret_cast<const Loaded *>(p); }
inline void store(float *p, Vector v) { *reinterpret_cast<Loaded *>(p) = v; }

inline Vector multiply_add(Vector a, Vector b, Vector c) {
#ifdef __FMA__
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline Vector broadcast(float value) {
#ifdef __AVX2__
    return _mm256_set1_ps(value);
#else
    return Vector{value, value, value, value};
#endif
}

inline float sum_of_lanes(Vector v) {
    float s[LANES];
    std::memcpy(s, &v, sizeof s);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
}

// sums[4] = the sums of four vectors, by the tree of sum_of_lanes.
inline void four_sums(const Vector *v, float *sums) {
#ifdef __AVX2__
    __m128 h[4];
    for (int i = 0; i < 4; ++i) h[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
    _MM_TRANSPOSE4_PS(h[0], h[1], h[2], h[3]);
    _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(h[0], h[2]), _mm_add_ps(h[1], h[3])));
#else
    for (int i = 0; i < 4; ++i) sums[i] = sum_of_lanes(v[i]);
#endif
}

constexpr int64_t DEPTH = 512;          // columns of a forward panel
constexpr int64_t FORWARD_ROWS = 64;    // rows of w in a forward panel: 128 KB
constexpr int64_t FORWARD_BATCH = 96;   // rows of x that share a panel: 192 KB
constexpr int64_t SHARED_X = 96 << 10;  // floats of x converted once for all threads rather than by each

// sums[m][n] += dot(x[m], w[n]) for MR rows of x and 4 of w; `depth` is a multiple of LANES.
template <int MR>
inline void dot_tile(const float *x, int64_t x_stride, const float *w, int64_t depth, float *sums, int64_t sums_stride) {
    Vector total[MR][4] = {};
    for (int64_t k = 0; k < depth; k += LANES) {
        Vector xs[MR];
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) xs[m] = load(x + m * x_stride + k);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            const Vector ws = load(w + n * DEPTH + k);
#pragma GCC unroll 4
            for (int m = 0; m < MR; ++m) total[m][n] = multiply_add(xs[m], ws, total[m][n]);
        }
    }
    for (int m = 0; m < MR; ++m) {
        float part[4];
        four_sums(total[m], part);
        for (int n = 0; n < 4; ++n) sums[m * sums_stride + n] += part[n];
    }
}

void dot_panel(const float *x, int64_t x_stride, int64_t num_m, const float *w, int64_t num_n, int64_t depth, float *sums) {
    for (int64_t n = 0; n < num_n; n += 4) {
        const float *wn = w + n * DEPTH;
        int64_t m = 0;
        for (; m + 3 <= num_m; m += 3)
            dot_tile<3>(x + m * x_stride, x_stride, wn, depth, sums + m * FORWARD_ROWS + n, FORWARD_ROWS);
        if (num_m - m == 2) dot_tile<2>(x + m * x_stride, x_stride, wn, depth, sums + m * FORWARD_ROWS + n, FORWARD_ROWS);
        if (num_m - m == 1) dot_tile<1>(x + m * x_stride, x_stride, wn, depth, sums + m * FORWARD_ROWS + n, FORWARD_ROWS);
    }
}

inline int64_t padded(int64_t columns) { return ceil_div(columns, LANES) * LANES; }

inline void decode(const sh_weight &w, int64_t row, int64_t k0, int64_t count, bool to_bf16, float *out) {
    if (to_bf16)
        decode_segment_bf16(w, row, k0, count, out);
    else
        decode_segment(w, row, k0, count, out);
}

void finish_rows(const float *sums, int64_t num_m, int64_t num_n, const void *bias, int32_t bias_dtype, void *y, int32_t dtype,
                 int64_t y_start, int64_t y_stride, int64_t n0) {
    float row[FORWARD_ROWS], added[FORWARD_ROWS];
    if (bias) load_floats(bias, bias_dtype, n0, num_n, added);
    for (int64_t m = 0; m < num_m; ++m) {
        for (int64_t n = 0; n < num_n; ++n) row[n] = bias ? sums[m * FORWARD_ROWS + n] + added[n] : sums[m * FORWARD_ROWS + n];
        store_floats(row, num_n, y, dtype, y_start + m * y_stride + n0);
    }
}

struct Forward {
    const sh_weight *w;
    const void *x;
    int32_t dtype;
    const void *bias;
    int32_t bias_dtype;
    void *y;
    bool to_bf16;
    const float *shared_x;  // all of x as float32 with rows padded by zeros, or null
};

// Outputs [m0, m0 + num_m) x [n0, n0 + num_n). `scratch` holds a panel, sums, and rows of x where these are not shared.
void forward_tile(const Forward &f, int64_t m0, int64_t num_m, int64_t n0, int64_t num_n, float *scratch) {
    const int64_t columns = f.w->columns;
    float *panel = scratch, *sums = panel + FORWARD_ROWS * DEPTH, *converted = sums + FORWARD_BATCH * FORWARD_ROWS;
    std::fill(sums, sums + num_m * FORWARD_ROWS, 0.0f);
    for (int64_t k0 = 0; k0 < columns; k0 += DEPTH) {
        const int64_t count = std::min(DEPTH, columns - k0), depth = padded(count);
        for (int64_t n = 0; n < ceil_div(num_n, 4) * 4; ++n) {
            float *row = panel + n * DEPTH;
            if (n < num_n) decode(*f.w, n0 + n, k0, count, f.to_bf16, row);
            std::fill(row + (n < num_n ? count : 0), row + depth, 0.0f);
        }
        const float *x = f.shared_x + m0 * padded(columns) + k0;
        int64_t stride = padded(columns);
        if (!f.shared_x) {
            for (int64_t m = 0; m < num_m; ++m) {
                load_floats(f.x, f.dtype, (m0 + m) * columns + k0, count, converted + m * DEPTH);
                std::fill(converted + m * DEPTH + count, converted + m * DEPTH + depth, 0.0f);
            }
            x = converted, stride = DEPTH;
        }
        dot_panel(x, stride, num_m, panel, num_n, depth, sums);
    }
    finish_rows(sums, num_m, num_n, f.bias, f.bias_dtype, f.y, f.dtype, m0 * f.w->rows, f.w->rows, n0);
}

constexpr int64_t WIDTH = 64;            // columns of a backward panel
constexpr int64_t BACKWARD_ROWS = 128;   // rows of w in a backward panel: 32 KB
constexpr int64_t BACKWARD_BATCH = 192;  // rows of dy that share a panel: 96 KB, and 48 KB of sums

// sums[m][0 … 2 LANES) += dy[m] . w for MR rows of dy.
template <int MR>
inline void row_tile(const float *dy, const float *w, int64_t depth, float *sums) {
    Vector total[MR][2];
    for (int m = 0; m < MR; ++m) total[m][0] = load(sums + m * WIDTH), total[m][1] = load(sums + m * WIDTH + LANES);
    for (int64_t n = 0; n < depth; ++n) {
        const Vector w0 = load(w + n * WIDTH), w1 = load(w + n * WIDTH + LANES);
#pragma GCC unroll 6
        for (int m = 0; m < MR; ++m) {
            const Vector d = broadcast(dy[m * BACKWARD_ROWS + n]);
            total[m][0] = multiply_add(d, w0, total[m][0]);
            total[m][1] = multiply_add(d, w1, total[m][1]);
        }
    }
    for (int m = 0; m < MR; ++m) store(sums + m * WIDTH, total[m][0]), store(sums + m * WIDTH + LANES, total[m][1]);
}

void row_panel(const float *dy, int64_t num_m, const float *w, int64_t depth, int64_t width, float *sums) {
    for (int64_t k = 0; k < width; k += 2 * LANES) {
        int64_t m = 0;
        for (; m + 6 <= num_m; m += 6) row_tile<6>(dy + m * BACKWARD_ROWS, w + k, depth, sums + m * WIDTH + k);
        for (; m + 2 <= num_m; m += 2) row_tile<2>(dy + m * BACKWARD_ROWS, w + k, depth, sums + m * WIDTH + k);
        if (m < num_m) row_tile<1>(dy + m * BACKWARD_ROWS, w + k, depth, sums + m * WIDTH + k);
    }
}

void backward_tile(const sh_weight &w, const void *dy, int32_t dtype, void *dx, bool to_bf16, int64_t m0, int64_t num_m,
                   int64_t k0, float *scratch) {
    const int64_t width = std::min(WIDTH, w.columns - k0);
    float *panel = scratch, *converted = panel + BACKWARD_ROWS * WIDTH, *sums = converted + BACKWARD_BATCH * BACKWARD_ROWS;
    std::fill(sums, sums + num_m * WIDTH, 0.0f);
    if (width < WIDTH) std::fill(panel, panel + BACKWARD_ROWS * WIDTH, 0.0f);
    for (int64_t n0 = 0; n0 < w.rows; n0 += BACKWARD_ROWS) {
        const int64_t depth = std::min(BACKWARD_ROWS, w.rows - n0);
        for (int64_t n = 0; n < depth; ++n) decode(w, n0 + n, k0, width, to_bf16, panel + n * WIDTH);
        for (int64_t m = 0; m < num_m; ++m)
            load_floats(dy, dtype, (m0 + m) * w.rows + n0, depth, converted + m * BACKWARD_ROWS);
        row_panel(converted, num_m, panel, depth, width, sums);
    }
    for (int64_t m = 0; m < num_m; ++m) store_floats(sums + m * WIDTH, width, dx, dtype, (m0 + m) * w.columns + k0);
}

}  // namespace

int32_t portable_forward(const sh_weight *w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y,
                         int64_t m, int32_t mode, int32_t threads) {
    if (!dtype_known(dtype) || (bias && !dtype_known(bias_dtype)) || w->group < 1) return SH_UNSUPPORTED;
    if (w->format != SH_INT4 && w->format != SH_TABLE16) return SH_UNSUPPORTED;
    if (mode == SH_INT8) return portable_forward_int8(w, x, dtype, bias, bias_dtype, y, m, threads);
    if (mode != SH_BF16_MODE && mode != SH_EXACT) return SH_UNSUPPORTED;
    if (m == 0 || w->rows == 0) return SH_OK;
    const int64_t columns = w->columns, stride = padded(columns);
    const int team = worthwhile_threads(threads, w->rows * ceil_div(columns, 2) * m);
    const bool share = m <= FORWARD_BATCH && m * stride <= SHARED_X;
    // A panel's rows of w: few where x is small, so that it stays in the first cache and every thread gets some.
    int64_t rows = m <= 4 ? 8 : m <= 16 ? 16 : FORWARD_ROWS;
    while (rows > 16 && ceil_div(w->rows, rows) < 2 * team) rows /= 2;
    const int64_t per_thread = FORWARD_ROWS * DEPTH + FORWARD_BATCH * FORWARD_ROWS + (share ? 0 : FORWARD_BATCH * DEPTH);
    const int64_t shared_floats = share ? ceil_div(m * stride, 16) * 16 : 0;
    Scratch memory((shared_floats + per_thread * team) * 4);
    if (!memory.get()) return SH_NO_MEMORY;
    float *const floats = reinterpret_cast<float *>(memory.get()), *const own = floats + shared_floats;
    if (share)
        for (int64_t i = 0; i < m; ++i) {
            load_floats(x, dtype, i * columns, columns, floats + i * stride);
            std::fill(floats + i * stride + columns, floats + (i + 1) * stride, 0.0f);
        }
    const bool to_bf16 = mode == SH_BF16_MODE && dtype == SH_BF16;
    const Forward f{w, x, dtype, bias, bias_dtype, y, to_bf16, share ? floats : nullptr};
    const int64_t tiles_n = ceil_div(w->rows, rows), tiles = tiles_n * ceil_div(m, FORWARD_BATCH);
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m0 = tile / tiles_n * FORWARD_BATCH, n0 = tile % tiles_n * rows;
        forward_tile(f, m0, std::min(FORWARD_BATCH, m - m0), n0, std::min(rows, w->rows - n0),
                     own + per_thread * thread_number());
    }
    return SH_OK;
}

int32_t portable_backward(const sh_weight *w, const void *dy, int32_t dtype, void *dx, int64_t m, int32_t mode,
                          int32_t threads) {
    if (!dtype_known(dtype) || (mode != SH_BF16_MODE && mode != SH_EXACT) || w->group < 1) return SH_UNSUPPORTED;
    if (w->format != SH_INT4 && w->format != SH_TABLE16) return SH_UNSUPPORTED;
    if (m == 0 || w->columns == 0) return SH_OK;
    const int team = worthwhile_threads(threads, w->rows * ceil_div(w->columns, 2) * m);
    const int64_t per_thread = BACKWARD_ROWS * WIDTH + BACKWARD_BATCH * (BACKWARD_ROWS + WIDTH);
    Scratch memory(per_thread * team * 4);
    if (!memory.get()) return SH_NO_MEMORY;
    float *const own = reinterpret_cast<float *>(memory.get());
    const bool to_bf16 = mode == SH_BF16_MODE && dtype == SH_BF16;
    const int64_t tiles_k = ceil_div(w->columns, WIDTH), tiles = tiles_k * ceil_div(m, BACKWARD_BATCH);
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m0 = tile / tiles_k * BACKWARD_BATCH, k0 = tile % tiles_k * WIDTH;
        backward_tile(*w, dy, dtype, dx, to_bf16, m0, std::min(BACKWARD_BATCH, m - m0), k0, own + per_thread * thread_number());
    }
    return SH_OK;
}

}  // namespace stillhouse::SH_NAMESPACE
