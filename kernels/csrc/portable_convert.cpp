// Dequantize: the whole weight decoded in float32 and rounded once, a stretch of a row at a time through the first cache.
#include "decode.h"
#include "portable.h"

namespace stillhouse::SH_NAMESPACE {

int32_t portable_dequantize(const sh_weight *w, void *out, int32_t dtype, int32_t threads) {
    if (!dtype_known(dtype) || w->group < 1) return SH_UNSUPPORTED;
    if (w->format != SH_INT4 && w->format != SH_TABLE16) return SH_UNSUPPORTED;
    if (w->rows == 0 || w->columns == 0) return SH_OK;
    constexpr int64_t STRETCH = 2048;
    const int64_t columns = w->columns, stretches = ceil_div(columns, STRETCH);
    const int team = worthwhile_threads(threads, w->rows * ceil_div(columns, 2));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t i = 0; i < w->rows * stretches; ++i) {
        const int64_t row = i / stretches, k0 = i % stretches * STRETCH, count = std::min(STRETCH, columns - k0);
        if (dtype == SH_F32) {
            decode_segment(*w, row, k0, count, static_cast<float *>(out) + row * columns + k0);
        } else {
            float values[STRETCH];
            decode_segment(*w, row, k0, count, values);
            store_floats(values, count, out, dtype, row * columns + k0);
        }
    }
    return SH_OK;
}

}  // namespace stillhouse::SH_NAMESPACE
