// The functions of api.h for a library that is made of the portable implementation alone (generic, AVX2).
#include "portable.h"

#ifndef SH_ISA
#define SH_ISA "generic"
#endif

using namespace stillhouse::SH_NAMESPACE;

extern "C" {

const char *sh_isa() { return SH_ISA; }

int32_t sh_forward(const sh_weight *w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y, int64_t m,
                   int32_t mode, int32_t threads) {
    return portable_forward(w, x, dtype, bias, bias_dtype, y, m, mode, threads);
}

int32_t sh_backward(const sh_weight *w, const void *dy, int32_t dtype, void *dx, int64_t m, int32_t mode, int32_t threads) {
    return portable_backward(w, dy, dtype, dx, m, mode, threads);
}

int32_t sh_dequantize(const sh_weight *w, void *out, int32_t dtype, int32_t threads) {
    return portable_dequantize(w, out, dtype, threads);
}

int32_t sh_quantize_int4(const float *w, int64_t rows, int64_t columns, int64_t group, int32_t symmetric, int32_t scale_search,
                         uint8_t *codes, uint16_t *scales, uint8_t *zero_points, int32_t threads) {
    return portable_quantize_int4(w, rows, columns, group, symmetric, scale_search, codes, scales, zero_points, threads);
}

int32_t sh_quantize_table16(const float *w, int64_t count, int64_t group, const float *absmax, const float *table,
                            uint8_t *codes, int32_t threads) {
    return portable_quantize_table16(w, count, group, absmax, table, codes, threads);
}

int32_t sh_block_absmax(const float *w, int64_t count, int64_t group, float *absmax, int32_t threads) {
    return portable_block_absmax(w, count, group, absmax, threads);
}

uint64_t sh_read_bandwidth(const void *data, int64_t bytes, int32_t threads) {
    return portable_read_bandwidth(data, bytes, threads);
}

double sh_peak(int32_t kind, int64_t count, int32_t threads) { return portable_peak(kind, count, threads); }

}  // extern "C"
