// What the 8-bit forward works on: stretches of K, quantized rows of x, unpacked rows of w. Included by portable_int8.cpp
// alone.
#pragma once
#include <algorithm>

#include "decode.h"
#include "portable.h"

namespace stillhouse::SH_NAMESPACE {
namespace {

constexpr int ROWS = 8;   // rows of w unpacked together
constexpr int BATCH = 4;  // rows of x that meet them together

struct Stretch {
    int64_t start, count, group;
    int64_t offset;  // where its codes start in a row whose stretches are padded to fours
};

// The weight's groups lie alike in every row: always with int4, and with tables whose blocks do not cross rows.
inline bool rows_alike(const sh_weight &w) { return w.format == SH_INT4 || w.columns % w.group == 0; }

int64_t cut(const sh_weight &w, Stretch *stretches, int64_t *row_length) {
    int64_t count = 0, offset = 0;
    for (int64_t k = 0, group = 0; k < w.columns; ++count) {
        const int64_t in_block = 32 - k % 32, in_group = rows_alike(w) ? (group + 1) * w.group - k : in_block;
        const int64_t take = std::min({in_block, in_group, w.columns - k});
        stretches[count] = {k, take, group, offset};
        offset += ceil_div(take, 4) * 4;
        k += take;
        group += rows_alike(w) && take == in_group;
    }
    *row_length = offset;
    return count;
}

// Quantized rows of x, cut as the stretches are.
struct Activations {
    int8_t *codes;  // [rows][length]
    float *scales;  // [rows][stretches]
    int32_t *sums;  // [rows][stretches], of the codes
    int64_t length, num_stretches;
};

void prepare_row(const void *x, int32_t dtype, int64_t row, int64_t columns, const Stretch *stretches, const Activations &a,
                 int64_t slot) {
    int8_t *codes = a.codes + slot * a.length;
    float *scales = a.scales + slot * a.num_stretches;
    int32_t *sums = a.sums + slot * a.num_stretches;
    float values[32], scale = 0.0f;
    int8_t quantized[32];
    int64_t block = -1;
    for (int64_t s = 0; s < a.num_stretches; ++s) {
        const Stretch &piece = stretches[s];
        if (piece.start / 32 != block) {
            block = piece.start / 32;
            const int64_t n = std::min<int64_t>(32, columns - block * 32);
            load_floats(x, dtype, row * columns + block * 32, n, values);
            quantize_activations(values, n, quantized, &scale);
        }
        int32_t sum = 0;
        int8_t *out = codes + piece.offset;
        for (int64_t i = 0; i < piece.count; ++i) out[i] = quantized[piece.start - block * 32 + i], sum += out[i];
        for (int64_t i = piece.count; i < ceil_div(piece.count, 4) * 4; ++i) out[i] = 0;
        scales[s] = scale, sums[s] = sum;
    }
}

// Eight rows of w: scales and zero points [stretches][8]; codes [length / 4][8 rows][4] for AVX2, elsewhere [8 rows][length].
struct Panel {
    int64_t length;
    int8_t *codes;
    float *scales;
    int32_t *zeros;
};

void fill_scales(const sh_weight &w, int64_t n0, int64_t num_n, const Stretch *stretches, int64_t num_stretches,
                 const Panel &panel) {
    for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t first_block = std::min(n0 + r, n0 + num_n - 1) * groups_per_row(w);
        for (int64_t s = 0; s < num_stretches; ++s) {
            const int64_t block = first_block + stretches[s].group;
            panel.scales[s * ROWS + r] = sh_integer_scale(w, block);
            panel.zeros[s * ROWS + r] = w.format == SH_INT4 ? (w.zero_points ? w.zero_points[block] : 8) : 0;
        }
    }
}

// Absent rows repeat the last one; their sums are not stored.
void unpack_codes(const sh_weight &w, int64_t n0, int64_t num_n, const Stretch *stretches, int64_t num_stretches,
                  const int8_t *levels, const Panel &panel) {
    const bool int4 = w.format == SH_INT4;
    for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t row = std::min(n0 + r, n0 + num_n - 1), first = int4 ? 0 : row * w.columns;
        const uint8_t *codes = int4 ? w.codes + row * ceil_div(w.columns, 2) : w.codes;
        for (int64_t s = 0; s < num_stretches; ++s) {
            const Stretch &piece = stretches[s];
            alignas(32) int8_t values[32] = {};
            int64_t i = 0, position = first + piece.start;
#ifdef __AVX2__
            if (!(position & 1))
                for (; i + 16 <= piece.count; i += 16) {
                    const uint8_t *bytes = codes + (position + i) / 2;
                    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(levels));
                    const __m128i q =
                        int4 ? sixteen_nibbles<false>(bytes) : _mm_shuffle_epi8(table, sixteen_nibbles<true>(bytes));
                    _mm_store_si128(reinterpret_cast<__m128i *>(values + i), q);
                }
#endif
            for (; i < piece.count; ++i)
                values[i] = int4 ? int8_t(nibble<false>(codes, position + i)) : levels[nibble<true>(codes, position + i)];
#ifdef __AVX2__
            for (int64_t k = 0; k < piece.count; k += 4)
                std::memcpy(panel.codes + (piece.offset + k) * ROWS + r * 4, values + k, 4);
#else
            std::memcpy(panel.codes + r * panel.length + piece.offset, values, size_t(ceil_div(piece.count, 4) * 4));
#endif
        }
    }
}

}  // namespace
}  // namespace stillhouse::SH_NAMESPACE
