// The AVX-512 library (F, BW, VL, DQ, VNNI, BF16, VBMI): which path serves which call. Weights whose rows or groups do not lie on
// byte and lane boundaries, and f16 activations, take the portable sources, compiled once more for this instruction set.
#include "avx512.h"
#include "avx512_panels.h"
#include "portable.h"

using namespace stillhouse::avx512;
using namespace stillhouse::SH_NAMESPACE;

namespace {

// Rows of activations up to which the streaming loops beat making panels: measured on Zen 5 over 4096 x 4096, weights from memory.
int64_t gemv_rows(const sh_weight &w, int32_t dtype, int32_t mode) {
    if (mode == SH_INT8) return 8;
    return dtype == SH_BF16 && w.format == SH_INT4 && !w.zero_points ? 16 : 12;
}

// What only the portable sources take, or refuse.
bool is_ours(const sh_weight &w, int32_t dtype, int32_t other_dtype = SH_F32) {
    const bool known = (w.format == SH_INT4 || w.format == SH_TABLE16) && w.group > 0;
    return known && is_regular(w) && (dtype == SH_F32 || dtype == SH_BF16) && (other_dtype == SH_F32 || other_dtype == SH_BF16);
}

template <bool FLIP, bool ZERO>
int32_t dequantize(const Weight &w, void *out, int32_t dtype, int threads) {
    const __m512 table = levels(w);
    const ScaleIndex index(w);
#pragma omp parallel for schedule(static) num_threads(team(threads, w.rows * w.row_bytes, 1))
    for (int64_t n = 0; n < w.rows; ++n)
        for (int64_t k = 0; k < w.columns; k += CHUNK) {
            const RowPart<FLIP, ZERO> part(w, n, k);
#pragma GCC unroll 8
            for (int q = 0; q < 8; ++q) store_f32(out, dtype, n * w.columns + k + 16 * q, first_lanes(w.columns - k - 16 * q), part.at(q, index, table));
        }
    return SH_OK;
}

}  // namespace

extern "C" {

SH_API const char *sh_isa() { return "avx512"; }

SH_API int32_t sh_forward(const sh_weight *w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m, int32_t mode, int32_t threads) {
    const bool known_mode = mode == SH_BF16_MODE || mode == SH_EXACT || (mode == SH_INT8 && w->group >= 32);
    if (m == 0 || !known_mode || !is_ours(*w, dtype, bias ? bias_dtype : SH_F32))
        return portable_forward(w, x, dtype, bias, bias_dtype, y, m, mode, threads);
    const bool few = m <= gemv_rows(*w, dtype, mode);
    if (mode == SH_INT8) return (few ? gemv_int8 : gemm_int8)(Weight(*w), x, dtype, bias, bias_dtype, y, m, threads);
    if (few) return gemv(Weight(*w), x, dtype, bias, bias_dtype, y, m, threads);
    return gemm_forward(Weight(*w), x, dtype, bias, bias_dtype, y, m, mode == SH_EXACT, threads);
}

SH_API int32_t sh_backward(const sh_weight *w, const void *dy, int32_t dtype, void *dx, int64_t m, int32_t mode, int32_t threads) {
    if (m == 0 || (mode != SH_BF16_MODE && mode != SH_EXACT) || !is_ours(*w, dtype)) return portable_backward(w, dy, dtype, dx, m, mode, threads);
    return gemm_backward(Weight(*w), dy, dtype, dx, m, mode == SH_EXACT, threads);
}

SH_API int32_t sh_dequantize(const sh_weight *w, void *out, int32_t dtype, int32_t threads) {
    if (!is_ours(*w, dtype)) return portable_dequantize(w, out, dtype, threads);
    const auto decode = w->format != SH_INT4 ? dequantize<true, false> : w->zero_points ? dequantize<false, true> : dequantize<false, false>;
    return decode(Weight(*w), out, dtype, threads);
}

SH_API int32_t sh_quantize_int4(const float *w, int64_t rows, int64_t columns, int64_t group, int32_t symmetric, int32_t scale_search, uint8_t *codes, uint16_t *scales, uint8_t *zero_points, int32_t threads) {
    return portable_quantize_int4(w, rows, columns, group, symmetric, scale_search, codes, scales, zero_points, threads);
}

SH_API int32_t sh_quantize_table16(const float *w, int64_t count, int64_t group, const float *absmax, const float *table, uint8_t *codes, int32_t threads) {
    return portable_quantize_table16(w, count, group, absmax, table, codes, threads);
}

SH_API int32_t sh_block_absmax(const float *w, int64_t count, int64_t group, float *absmax, int32_t threads) {
    return portable_block_absmax(w, count, group, absmax, threads);
}

SH_API uint64_t sh_read_bandwidth(const void *data, int64_t bytes, int32_t threads) { return portable_read_bandwidth(data, bytes, threads); }
SH_API double sh_peak(int32_t kind, int64_t count, int32_t threads) { return portable_peak(kind, count, threads); }

}  // extern "C"
