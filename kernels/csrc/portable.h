// The portable implementation of api.h: right for every shape, format and mode, on any processor.
//
// The generic and AVX2 libraries are made of nothing else; the AVX-512 library compiles its own copy, with its own flags and
// namespace, and calls it for what its fast paths do not take. Arguments and results are those of the sh_ functions.
#pragma once
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "api.h"

#ifndef SH_NAMESPACE
#define SH_NAMESPACE portable
#endif

namespace stillhouse::SH_NAMESPACE {

int32_t portable_forward(const sh_weight *w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y,
                         int64_t m, int32_t mode, int32_t threads);
int32_t portable_forward_int8(const sh_weight *w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y,
                              int64_t m, int32_t threads);
int32_t portable_backward(const sh_weight *w, const void *dy, int32_t dtype, void *dx, int64_t m, int32_t mode,
                          int32_t threads);
int32_t portable_dequantize(const sh_weight *w, void *out, int32_t dtype, int32_t threads);

int32_t portable_quantize_int4(const float *w, int64_t rows, int64_t columns, int64_t group, int32_t symmetric,
                               int32_t scale_search, uint8_t *codes, uint16_t *scales, uint8_t *zero_points, int32_t threads);
int32_t portable_quantize_table16(const float *w, int64_t count, int64_t group, const float *absmax, const float *table,
                                  uint8_t *codes, int32_t threads);
int32_t portable_block_absmax(const float *w, int64_t count, int64_t group, float *absmax, int32_t threads);

uint64_t portable_read_bandwidth(const void *data, int64_t bytes, int32_t threads);
double portable_peak(int32_t kind, int64_t count, int32_t threads);

// 8-bit activations: a[k] = round(x[k] / scale), one scale for each 32 along K. A block that holds NaN or infinity gets that as
// its scale and zeros as codes, so that it makes NaN of every sum it enters, as in float32. x is float32 [count], a is
// [count], scales [ceil(count / 32)].
void quantize_activations(const float *x, int64_t count, int8_t *a, float *scales);

// Threads worth waking: a team costs some microseconds, which 64 KB of codes times rows do not repay.
inline int worthwhile_threads(int32_t threads, int64_t codes_bytes_times_rows) {
    return threads <= 1 || codes_bytes_times_rows < (int64_t(1) << 16) ? 1 : threads;
}

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Aligned memory that frees itself; null where there is none left.
class Scratch {
   public:
    explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64 + 64))) {}
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    char *get() const { return static_cast<char *>(data_); }

   private:
    void *data_;
};

}  // namespace stillhouse::SH_NAMESPACE
