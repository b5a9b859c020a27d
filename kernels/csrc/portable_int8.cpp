// Forward with 8-bit activations: integer sums over stretches that share a weight's scale and an activation's scale.
//
// K is cut into stretches of at most 32 that lie in one block of 32 activations and one group of the weight, and each output is
//     y = fma(float(sum of a q - z * sum of a) * weight scale, activation scale, y)    stretch by stretch, in order of k
// (without FMA instructions: a product, a product and a sum). Table formats put round(127 level) in place of q - z.
// Eight rows of w are unpacked at a time, four k of each row side by side, so that one instruction multiplies 32 codes. For few
// rows of x that is not worth its stores: codes are multiplied as they are read (AVX2). Both give the same bits.
#include "portable_int8.h"

namespace stillhouse::SH_NAMESPACE {

void quantize_activations(const float *x, int64_t count, int8_t *a, float *scales) {
    for (int64_t k0 = 0; k0 < count; k0 += 32) {
        const int64_t n = std::min<int64_t>(32, count - k0);
        float padded[32] = {};
        std::copy(x + k0, x + k0 + n, padded);
        // As integers, magnitudes order like floats and NaN is above infinity.
        uint32_t top = 0;
        for (int i = 0; i < 32; ++i) top = std::max(top, float_bits(padded[i]) & 0x7fffffffu);
        const bool finite = top < 0x7f800000u;
        const float scale = finite ? bits_float(top) / 127.0f : bits_float(top);
        scales[k0 / 32] = scale;
        const bool zeros = !finite || scale == 0.0f;
        int8_t codes[32];
        for (int i = 0; i < 32; ++i) {
            // 1.5 * 2^23 and back rounds to the nearest even integer.
            const float ratio = zeros ? 0.0f : std::min(127.0f, std::max(-127.0f, padded[i] / scale));
            codes[i] = int8_t(int32_t((ratio + 12582912.0f) - 12582912.0f));
        }
        std::copy(codes, codes + n, a + k0);
    }
}

namespace {

inline float add_product(float weighted, float scale, float y) {
#ifdef __FMA__
    return __builtin_fmaf(weighted, scale, y);
#else
    return weighted * scale + y;
#endif
}

inline int32_t dot(const int8_t *a, const int8_t *b, int64_t count) {
    int32_t sum = 0;
    if (count == 32) {  // a length that the compiler knows becomes a few wide instructions
        for (int i = 0; i < 32; ++i) sum += int32_t(a[i]) * int32_t(b[i]);
        return sum;
    }
    for (int64_t i = 0; i < count; ++i) sum += int32_t(a[i]) * int32_t(b[i]);
    return sum;
}

#ifdef __AVX2__
// Up to BATCH rows of x with codes as they are read, where every stretch is a whole 32 (the last may be shorter) of whole
// bytes.
template <bool Signed>
void multiply_direct(const sh_weight &w, int64_t n0, int64_t num_n, const Panel &panel, const int8_t *levels,
                     const Activations &a, int64_t num_m, float (*y)[ROWS]) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(levels)));
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t *codes[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) codes[r] = w.codes + std::min(n0 + r, n0 + num_n - 1) * ceil_div(w.columns, 2);
    std::fill(y[0], y[0] + num_m * ROWS, 0.0f);
    for (int64_t s = 0; s < a.num_stretches; ++s) {
        const int64_t count = std::min<int64_t>(32, w.columns - s * 32);
        __m256i q[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            uint8_t tail[16] = {};
            if (count < 32) std::memcpy(tail, codes[r] + s * 16, size_t((count + 1) / 2));
            const uint8_t *bytes = count < 32 ? tail : codes[r] + s * 16;
            q[r] = _mm256_set_m128i(sixteen_nibbles<Signed>(bytes + 8), sixteen_nibbles<Signed>(bytes));
            if (Signed) q[r] = _mm256_shuffle_epi8(table, q[r]);
        }
        const __m256 weight_scales = _mm256_loadu_ps(panel.scales + s * ROWS);
        const __m256i zeros = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(panel.zeros + s * ROWS));
        for (int64_t m = 0; m < num_m; ++m) {
            int8_t row_end[32] = {};
            const int8_t *from = a.codes + m * a.length + s * 32;
            if (count < 32) std::memcpy(row_end, from, size_t(count)), from = row_end;
            const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
            __m256i part[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const __m256i pairs = Signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(q[r]), _mm256_sign_epi8(v, q[r]))
                                             : _mm256_maddubs_epi16(q[r], v);
                part[r] = _mm256_madd_epi16(pairs, ones);
            }
            const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(part[0], part[1]), _mm256_hadd_epi32(part[2], part[3]));
            const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(part[4], part[5]), _mm256_hadd_epi32(part[6], part[7]));
            __m256i sum =
                _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
            if (!Signed)
                sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(a.sums[m * a.num_stretches + s])));
            const __m256 scale = _mm256_set1_ps(a.scales[m * a.num_stretches + s]);
            const __m256 weighted = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), weight_scales);
            _mm256_storeu_ps(y[m], _mm256_fmadd_ps(weighted, scale, _mm256_loadu_ps(y[m])));
        }
    }
}
#endif

// y[m][0 … 8) for MB rows of activations from `slot` on.
template <int MB, bool Signed>
void multiply_panel(const Panel &panel, const Stretch *stretches, const Activations &a, int64_t slot, float (*y)[ROWS]) {
    const int8_t *rows = a.codes + slot * a.length;
    const float *scales = a.scales + slot * a.num_stretches;
    const int32_t *sums = a.sums + slot * a.num_stretches;
#ifdef __AVX2__
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 total[MB];
    for (int m = 0; m < MB; ++m) total[m] = _mm256_setzero_ps();
    for (int64_t s = 0; s < a.num_stretches; ++s) {
        const int64_t end = stretches[s].offset + stretches[s].count;
        __m256i part[MB];
        for (int m = 0; m < MB; ++m) part[m] = _mm256_setzero_si256();
        for (int64_t k = stretches[s].offset; k < end; k += 4) {
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(panel.codes + k * ROWS));
#pragma GCC unroll 4
            for (int m = 0; m < MB; ++m) {
                int32_t four;
                std::memcpy(&four, rows + m * a.length + k, 4);
                const __m256i v = _mm256_set1_epi32(four);
                if (Signed)  // 127 * 127 * 2 fits 16 bits, so that one factor's sign may move to the other
                    part[m] = _mm256_add_epi32(
                        part[m], _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(v, q)), ones));
                else  // 15 * 127 * 2 fits 8 times over: the stretch's sums stay in 16 bits
                    part[m] = _mm256_add_epi16(part[m], _mm256_maddubs_epi16(q, v));
            }
        }
        const __m256 weight_scales = _mm256_loadu_ps(panel.scales + s * ROWS);
        const __m256i zeros = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(panel.zeros + s * ROWS));
#pragma GCC unroll 4
        for (int m = 0; m < MB; ++m) {
            __m256i sum = Signed ? part[m] : _mm256_madd_epi16(part[m], ones);
            if (!Signed)
                sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(sums[m * a.num_stretches + s])));
            total[m] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), weight_scales),
                                       _mm256_set1_ps(scales[m * a.num_stretches + s]), total[m]);
        }
    }
    for (int m = 0; m < MB; ++m) _mm256_storeu_ps(y[m], total[m]);
#else
    for (int m = 0; m < MB; ++m) {
        for (int r = 0; r < ROWS; ++r) y[m][r] = 0.0f;
        for (int64_t s = 0; s < a.num_stretches; ++s) {
            int32_t part[ROWS] = {};
            for (int r = 0; r < ROWS; ++r)
                part[r] = dot(panel.codes + r * a.length + stretches[s].offset, rows + m * a.length + stretches[s].offset,
                              stretches[s].count);
            const float scale = scales[m * a.num_stretches + s];
            const int32_t sum = sums[m * a.num_stretches + s];
            for (int r = 0; r < ROWS; ++r)
                y[m][r] =
                    add_product(float(part[r] - panel.zeros[s * ROWS + r] * sum) * panel.scales[s * ROWS + r], scale, y[m][r]);
        }
    }
#endif
}

template <bool Signed>
void multiply_rows(const Panel &panel, const Stretch *stretches, const Activations &a, int64_t slot, int64_t count,
                   float (*y)[ROWS]) {
    switch (count) {
        case 1:
            return multiply_panel<1, Signed>(panel, stretches, a, slot, y);
        case 2:
            return multiply_panel<2, Signed>(panel, stretches, a, slot, y);
        case 3:
            return multiply_panel<3, Signed>(panel, stretches, a, slot, y);
        default:
            return multiply_panel<BATCH, Signed>(panel, stretches, a, slot, y);
    }
}

// A table weight whose blocks cross rows: one row of w at a time, its own borders beside the 32s of the activations.
float multiply_crossing(const sh_weight &w, int64_t row, const int8_t *values, const Activations &a, int64_t slot) {
    float y = 0.0f;
    const int64_t first = row * w.columns;
    for (int64_t k = 0; k < w.columns;) {
        const int64_t block = (first + k) / w.group, in_group = (block + 1) * w.group - (first + k);
        const int64_t end = k + std::min({in_group, 32 - k % 32, w.columns - k});
        const int32_t sum = dot(values + k, a.codes + slot * a.length + k, end - k);
        y = add_product(float(sum) * sh_integer_scale(w, block), a.scales[slot * a.num_stretches + k / 32], y);
        k = end;
    }
    return y;
}

}  // namespace

int32_t portable_forward_int8(const sh_weight *w, const void *x, int32_t dtype, const void *bias, int32_t bias_dtype, void *y,
                              int64_t m, int32_t threads) {
    if (m == 0 || w->rows == 0) return SH_OK;
    const int team = worthwhile_threads(threads, w->rows * ceil_div(w->columns, 2) * m);
    const bool alike = rows_alike(*w);
    const int64_t most = ceil_div(w->columns, 32) + (alike ? groups_per_row(*w) : 0);
    Scratch cuts(most * int64_t(sizeof(Stretch)));
    if (!cuts.get()) return SH_NO_MEMORY;
    Stretch *const stretches = reinterpret_cast<Stretch *>(cuts.get());
    Activations a{};
    a.num_stretches = cut(*w, stretches, &a.length);
    a.length = ceil_div(a.length, 4) * 4;
    // Rows of x quantized at a time, for all threads: about 768 KB.
    const int64_t row_bytes = a.length + 8 * a.num_stretches;
    const int64_t batch = std::min(m, std::max<int64_t>(BATCH, (768 << 10) / row_bytes / BATCH * BATCH));
    const int64_t panel_bytes = ceil_div(std::max(a.length * ROWS + a.num_stretches * ROWS * 8, w->columns), 64) * 64;
    const int64_t shared = ceil_div(batch * row_bytes, 64) * 64;
    Scratch memory(shared + panel_bytes * team);
    if (!memory.get()) return SH_NO_MEMORY;
    a.scales = reinterpret_cast<float *>(memory.get());
    a.sums = reinterpret_cast<int32_t *>(a.scales + batch * a.num_stretches);
    a.codes = reinterpret_cast<int8_t *>(a.sums + batch * a.num_stretches);
#ifdef __AVX2__
    const bool direct = m <= BATCH && alike && w->group % 32 == 0 && (w->format == SH_INT4 || w->columns % 2 == 0);
#endif
    int8_t levels[16] = {};
    if (w->format == SH_TABLE16) table_levels(w->table, levels);
#pragma omp parallel num_threads(team) if (team > 1)
    {
        char *const own = memory.get() + shared + panel_bytes * thread_number();
        Panel panel{};
        panel.length = a.length;
        panel.scales = reinterpret_cast<float *>(own);
        panel.zeros = reinterpret_cast<int32_t *>(panel.scales + a.num_stretches * ROWS);
        panel.codes = reinterpret_cast<int8_t *>(panel.zeros + a.num_stretches * ROWS);
        for (int64_t m0 = 0; m0 < m; m0 += batch) {
            const int64_t num_m = std::min(batch, m - m0);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < num_m; ++i) prepare_row(x, dtype, m0 + i, w->columns, stretches, a, i);
#pragma omp for schedule(dynamic, 1)
            for (int64_t n0 = 0; n0 < w->rows; n0 += ROWS) {
                const int64_t num_n = std::min<int64_t>(ROWS, w->rows - n0);
                float sums[BATCH][ROWS], added[ROWS] = {};
                if (bias) load_floats(bias, bias_dtype, n0, num_n, added);
                const auto finish = [&](float *row, int64_t i, int64_t n, int64_t count) {
                    if (bias)
                        for (int64_t r = 0; r < count; ++r) row[r] += added[n + r - n0];
                    store_floats(row, count, y, dtype, (m0 + i) * w->rows + n);
                };
                if (!alike) {
                    for (int64_t n = n0; n < n0 + num_n; ++n) {
                        int8_t *const values = reinterpret_cast<int8_t *>(own);
                        for (int64_t k = 0; k < w->columns; ++k) values[k] = levels[nibble<true>(w->codes, n * w->columns + k)];
                        for (int64_t i = 0; i < num_m; ++i) {
                            sums[0][0] = multiply_crossing(*w, n, values, a, i);
                            finish(sums[0], i, n, 1);
                        }
                    }
                    continue;
                }
                fill_scales(*w, n0, num_n, stretches, a.num_stretches, panel);
#ifdef __AVX2__
                if (direct) {
                    if (w->format == SH_INT4)
                        multiply_direct<false>(*w, n0, num_n, panel, levels, a, num_m, sums);
                    else
                        multiply_direct<true>(*w, n0, num_n, panel, levels, a, num_m, sums);
                    for (int64_t i = 0; i < num_m; ++i) finish(sums[i], i, n0, num_n);
                    continue;
                }
#endif
                unpack_codes(*w, n0, num_n, stretches, a.num_stretches, levels, panel);
                for (int64_t i = 0; i < num_m; i += BATCH) {
                    const int64_t count = std::min<int64_t>(BATCH, num_m - i);
                    if (w->format == SH_INT4)
                        multiply_rows<false>(panel, stretches, a, i, count, sums);
                    else
                        multiply_rows<true>(panel, stretches, a, i, count, sums);
                    for (int64_t j = 0; j < count; ++j) finish(sums[j], i + j, n0, num_n);
                }
            }
        }
    }
    return SH_OK;
}

}  // namespace stillhouse::SH_NAMESPACE
