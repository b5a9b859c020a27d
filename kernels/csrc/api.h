// The C interface of the 4-bit kernels: one shared library per instruction set, all with these functions.
//
// Nothing here knows of torch or Python: pointers, sizes, and an int that says how it went. The weight is read in its
// canonical bytes, as kernels/formats.py defines them and as files hold them; no library keeps a second layout.
#pragma once
#include <cstdint>

// The libraries are built with hidden visibility; only these functions leave them.
#define SH_API __attribute__((visibility("default")))

extern "C" {

enum sh_format : int32_t { SH_INT4 = 0, SH_TABLE16 = 1 };
enum sh_dtype : int32_t { SH_F32 = 0, SH_BF16 = 1, SH_F16 = 2 };
// How a product is computed. SH_BF16_MODE: bf16 activations meet weights rounded to bf16, sums in fp32 (the AVX-512 library does
// not round them for a few rows, which is more exact); f32 and f16 activations are never rounded and meet f32 weights.
// SH_EXACT: f32 throughout. SH_INT8: activations in 8 bits, one scale for each 32 along K of a row, integer sums.
enum sh_mode : int32_t { SH_BF16_MODE = 0, SH_EXACT = 1, SH_INT8 = 2 };

// 0 is success; these come back from a call that did nothing.
enum sh_error : int32_t { SH_OK = 0, SH_UNSUPPORTED = 1, SH_NO_MEMORY = 2 };

// One packed weight of `rows` x `columns` (N x K) numbers. Unused pointers are null.
//   SH_INT4:    w = scales * (q - z). codes [N][ceil(K/2)], low nibble = even k; scales f16 [N][ceil(K/group)];
//               zero_points u8 of the same shape, or null for 8 everywhere.
//   SH_TABLE16: w = table[q] * absmax. codes ceil(N K/2) bytes of the flattened tensor, HIGH nibble = even element; one absmax
//               per `group` elements of the flattened tensor (a block may cross rows): f32 `absmax`, or nested:
//               nested_map[nested_codes[b]] * nested_absmax[b / 256] + nested_offset[0], two roundings, never an fma.
struct sh_weight {
    int32_t format;
    int32_t reserved;
    int64_t rows, columns;
    int64_t group;
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zero_points;
    const float *absmax;
    const uint8_t *nested_codes;
    const float *nested_absmax;
    const float *nested_map;
    const float *nested_offset;
    const float *table;
};

// "avx512", "avx2" or "generic": what this library was compiled for.
SH_API const char *sh_isa();

// y[M][N] = x[M][K] @ w^T + bias; x and y have dtype `dtype`, both dense; bias [N] of `bias_dtype`, or null.
SH_API int32_t sh_forward(const sh_weight *w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y,
                          int64_t m, int32_t mode, int32_t threads);

// dx[M][K] = dy[M][N] @ w; mode SH_BF16_MODE or SH_EXACT.
SH_API int32_t sh_backward(const sh_weight *w, const void *dy, int32_t dtype, void *dx, int64_t m, int32_t mode,
                           int32_t threads);

// out[N][K] = the decoded weight: computed in f32, rounded once to `dtype`.
SH_API int32_t sh_dequantize(const sh_weight *w, void *out, int32_t dtype, int32_t threads);

// The encoders: the same choices, bit for bit, as kernels/rounding.py. w is f32 [N][K], finite.
SH_API int32_t sh_quantize_int4(const float *w, int64_t rows, int64_t columns, int64_t group, int32_t symmetric,
                                int32_t scale_search, uint8_t *codes, uint16_t *scales, uint8_t *zero_points,
                                int32_t threads);
// Codes of a weight for the absmax that are given (decoded, one per `group` elements), nearest of the 16 rising levels.
SH_API int32_t sh_quantize_table16(const float *w, int64_t count, int64_t group, const float *absmax, const float *table,
                                   uint8_t *codes, int32_t threads);
// absmax of each `group` elements of a flattened weight, f32 [ceil(count/group)].
SH_API int32_t sh_block_absmax(const float *w, int64_t count, int64_t group, float *absmax, int32_t threads);

// Read `bytes` bytes once with every thread, and return a checksum: the bandwidth that this library's loads can reach.
SH_API uint64_t sh_read_bandwidth(const void *data, int64_t bytes, int32_t threads);
// Run `count` rounds of independent multiply-adds of a kind (0 f32 FMA, 1 bf16 dot, 2 int8 dot) per thread; the operations done
// (2 per multiply-add), 0 where this library has no such instruction.
SH_API double sh_peak(int32_t kind, int64_t count, int32_t threads);

}  // extern "C"
