// Encoders: the choices of kernels/rounding.py, bit for bit, for many groups of weights at once.
//
// One lane of a vector is one group, so a group's error is summed in a fixed order on every instruction set: in halves, element
// i with element i + 2^k, as rounding.py sums it. Only correctly rounded single operations are used (compile with
// -ffp-contract=off; products of a code and a scale are exact, so there a fused operation could not differ either). The search
// keeps the scale of the least error, and codes follow from it: they need no storage while candidates are tried.
#include <algorithm>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "numbers.h"
#include "portable.h"

namespace stillhouse::SH_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

constexpr float MIN_SCALE = 0x1p-14f, MAX_SCALE = 65280.0f;
constexpr int64_t CHUNK = 16384;  // weights that one thread encodes at a time

inline Floats all(float value) { return value - Floats{}; }
// GCC makes a comparison and a blend of the conditional expression, where one instruction does.
#if defined(__AVX512F__)
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE2__)
inline Floats smaller(Floats a, Floats b) { return _mm_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm_max_ps(a, b); }
#else
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
#endif
inline Floats clamp(Floats v, float low, float high) { return smaller(larger(v, all(low)), all(high)); }
inline Floats magnitude(Floats v) { return Floats(Bits(v) & 0x7fffffffu); }

// Nearest even integer of |v| < 2^22: beyond 1.5 * 2^23 float32 has no fractions.
inline Floats nearest(Floats v) { return (v + 12582912.0f) - 12582912.0f; }

// rounding._round_scale: 8 significant bits, float16's normal range, the sign kept.
inline Floats round_scale(Floats scale) {
    const Bits bits = Bits(scale);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return Floats(Bits(clamp(magnitude(Floats(rounded)), MIN_SCALE, MAX_SCALE)) | (rounded & 0x80000000u));
}

// LANES groups of `size` weights: element i of lane l is weights[i][l]. Scratch of `size` vectors each: terms, quotients.
struct Groups {
    const Floats *weights;
    int64_t size;
    Floats *terms, *quotients;

    // term(0) + … + term(size - 1), summed in halves.
    template <class Term>
    Floats sum(Term term) const {
        int64_t half = 1;
        while (half * 2 < size) half *= 2;
        if (size == 1) return term(0);
        const int64_t both = size - half;
        for (int64_t i = 0; i < both; ++i) terms[i] = term(i) + term(i + half);
        for (int64_t i = both; i < half; ++i) terms[i] = term(i);
        for (half /= 2; half; half /= 2)
            for (int64_t i = 0; i < half; ++i) terms[i] += terms[i + half];
        return terms[0];
    }

    Floats extreme() const {
        Floats found = weights[0];
        for (int64_t i = 1; i < size; ++i) found = magnitude(weights[i]) > magnitude(found) ? weights[i] : found;
        return found;
    }
};

struct Choice {
    Floats scale, zero, error;

    void keep_better(const Choice &other) {
        const Ints better = other.error < error;
        scale = better ? other.scale : scale;
        zero = better ? other.zero : zero;
        error = better ? other.error : error;
    }
};

inline Floats symmetric_code(Floats weight, Floats scale) { return nearest(clamp(weight / scale, -8.0f, 7.0f)); }

Choice try_symmetric(const Groups &groups, Floats candidate) {
    const Floats scale = round_scale(candidate);
    const Floats error = groups.sum([&](int64_t i) {
        const Floats weight = groups.weights[i], off = weight - symmetric_code(weight, scale) * scale;
        return off * off;
    });
    return {scale, all(8.0f), error};
}

// A scale and its negative: their quotients differ in sign only, and division is what a try costs most.
void try_both_signs(const Groups &groups, Floats candidate, Choice *same, Choice *opposite) {
    const Floats scale = round_scale(candidate);
    for (int64_t i = 0; i < groups.size; ++i) groups.quotients[i] = groups.weights[i] / scale;
    same->error = groups.sum([&](int64_t i) {
        const Floats off = groups.weights[i] - nearest(clamp(groups.quotients[i], -8.0f, 7.0f)) * scale;
        return off * off;
    });
    opposite->error = groups.sum([&](int64_t i) {
        const Floats off = groups.weights[i] - nearest(clamp(groups.quotients[i], -7.0f, 8.0f)) * scale;
        return off * off;
    });
    same->scale = scale, opposite->scale = -scale;
    same->zero = opposite->zero = all(8.0f);
}

inline Floats asymmetric_code(Floats weight, Floats scale, Floats zero) {
    // Clamped before it is rounded, which changes no result between 0 and 15 and keeps nearest() in its range.
    return clamp(nearest(clamp(weight / scale, -32.0f, 32.0f)) + zero, 0.0f, 15.0f);
}

Choice try_asymmetric(const Groups &groups, Floats low, Floats candidate) {
    const Floats scale = round_scale(candidate), zero = nearest(clamp(-low / scale, 0.0f, 15.0f));
    const Floats error = groups.sum([&](int64_t i) {
        const Floats weight = groups.weights[i], off = weight - (asymmetric_code(weight, scale, zero) - zero) * scale;
        return off * off;
    });
    return {scale, zero, error};
}

// Lanes where `test` of every code holds.
template <class Test>
Ints every(const Floats *codes, int64_t size, Test test) {
    Ints holds = Ints{} == Ints{};
    for (int64_t i = 0; i < size; ++i) holds &= test(codes[i]);
    return holds;
}

// rounding._prefer_positive.
void prefer_positive(Floats *codes, int64_t size, Floats *scale) {
    const Ints even = every(codes, size, [](Floats q) { return (__builtin_convertvector(q, Ints) & 1) == 0; });
    const Ints halve = (*scale < 0.0f) & even & (magnitude(*scale) * 2.0f <= MAX_SCALE);
    *scale = halve ? *scale * 2.0f : *scale;
    for (int64_t i = 0; i < size; ++i) codes[i] = halve ? codes[i] * 0.5f : codes[i];
    const Ints flip = (*scale < 0.0f) & every(codes, size, [](Floats q) { return q > -8.0f; });
    *scale = flip ? -*scale : *scale;
    for (int64_t i = 0; i < size; ++i) codes[i] = flip ? -codes[i] : codes[i];
}

// Final codes 0 … 15 into `codes`, scale and zero point into what is returned.
Choice choose_symmetric(const Groups &groups, bool scale_search, Floats *codes) {
    const Floats extreme = groups.extreme();
    Choice best = try_symmetric(groups, scale_search ? -extreme / 1.0f : magnitude(extreme) / 7.0f);
    const auto encode = [&] {
        for (int64_t i = 0; i < groups.size; ++i) codes[i] = symmetric_code(groups.weights[i], best.scale);
    };
    if (scale_search) {
        // rounding.py tries -extreme / m for m = 1 … 8, then +-extreme / d for d = 6, 6.25 … 9; of equals it keeps the first.
        // The negatives of d = 6, 7, 8 come twice there; here they are tried once, and the positives wait for their turn.
        Choice negative, positive, waiting[3];
        for (int m = 2; m < 6; ++m) best.keep_better(try_symmetric(groups, -extreme / float(m)));
        for (int m = 6; m <= 8; ++m) {
            try_both_signs(groups, -extreme / float(m), &negative, &waiting[m - 6]);
            best.keep_better(negative);
        }
        for (int i = 0; i < 13; ++i) {
            const bool was_tried = i % 4 == 0 && i < 12;
            if (!was_tried) try_both_signs(groups, extreme / (6.0f + 0.25f * float(i)), &positive, &negative);
            best.keep_better(was_tried ? waiting[i / 4] : positive);
            if (!was_tried) best.keep_better(negative);
        }
        encode();
        const Floats products = groups.sum([&](int64_t i) { return groups.weights[i] * codes[i]; });
        const Floats squares = groups.sum([&](int64_t i) { return codes[i] * codes[i]; });
        best.keep_better(try_symmetric(groups, products / larger(squares, all(1.0f))));
    }
    encode();
    if (scale_search) prefer_positive(codes, groups.size, &best.scale);
    const Ints nothing = every(codes, groups.size, [](Floats q) { return q == 0.0f; });
    best.scale = nothing ? all(1.0f) : best.scale;
    for (int64_t i = 0; i < groups.size; ++i) codes[i] += 8.0f;
    return best;
}

Choice choose_asymmetric(const Groups &groups, bool scale_search, Floats *codes) {
    Floats low = {}, high = {};
    for (int64_t i = 0; i < groups.size; ++i) low = smaller(low, groups.weights[i]), high = larger(high, groups.weights[i]);
    const Floats span = high - low;
    Choice best = try_asymmetric(groups, low, span / 15.0f);
    if (scale_search) {
        for (int n = 1; n < 15; ++n) best.keep_better(try_asymmetric(groups, low, span / float(n)));
        for (int i = 1; i < 10; ++i) best.keep_better(try_asymmetric(groups, low, span / (15.0f + 0.5f * float(i))));
    }
    for (int64_t i = 0; i < groups.size; ++i) codes[i] = asymmetric_code(groups.weights[i], best.scale, best.zero);
    const Ints flat = every(codes, groups.size, [&](Floats q) { return q == best.zero; });
    best.scale = flat ? all(1.0f) : best.scale;
    best.zero = flat ? all(8.0f) : best.zero;
    for (int64_t i = 0; i < groups.size; ++i) codes[i] = flat ? all(8.0f) : codes[i];
    return best;
}

void pack_row(const uint8_t *codes, int64_t count, bool high_first, uint8_t *out) {
    const int low_shift = high_first ? 4 : 0, high_shift = 4 - low_shift;
    for (int64_t i = 0; i < count / 2; ++i) out[i] = uint8_t(codes[2 * i] << low_shift | codes[2 * i + 1] << high_shift);
    if (count & 1) out[count / 2] = uint8_t(codes[count - 1] << low_shift);
}

// Number of bounds below each of `count` weights over `absmax`.
void nearest_levels(const float *__restrict w, int64_t count, float absmax, const float *bounds, uint8_t *__restrict codes) {
    for (int64_t i = 0; i < count; ++i) {
        const float relative = absmax == 0.0f ? 0.0f : w[i] / absmax;
        int32_t code = 0;
#pragma GCC unroll 15
        for (int b = 0; b < 15; ++b) code += relative > bounds[b];
        codes[i] = uint8_t(code);
    }
}

}  // namespace

int32_t portable_quantize_int4(const float *w, int64_t rows, int64_t columns, int64_t group, int32_t symmetric,
                               int32_t scale_search, uint8_t *codes, uint16_t *scales, uint8_t *zero_points, int32_t threads) {
    if (group < 1 || (!symmetric && !zero_points)) return SH_UNSUPPORTED;
    if (rows == 0 || columns == 0) return SH_OK;
    const int64_t size = std::min(group, columns), per_row = columns / group + (columns % group != 0);
    // Whole rows, since two groups may share a byte; enough of them to fill the lanes.
    const int64_t batch = std::min(rows, std::max(CHUNK / columns + 1, LANES / per_row + 1)),
                  num_batches = (rows + batch - 1) / batch;
    const int team = worthwhile_threads(threads, rows * columns);
    const int64_t vectors = 4 * size, per_thread = vectors * int64_t(sizeof(Floats)) + (batch * columns + 63) / 64 * 64;
    Scratch memory(per_thread * team);
    if (!memory.get()) return SH_NO_MEMORY;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
    for (int64_t b = 0; b < num_batches; ++b) {
        char *const own = memory.get() + per_thread * thread_number();
        Floats *const weights = reinterpret_cast<Floats *>(own), *const chosen = weights + size, *const terms = chosen + size;
        uint8_t *const row_codes = reinterpret_cast<uint8_t *>(terms + 2 * size);
        const int64_t first_row = b * batch, num_rows = std::min(batch, rows - first_row), num_groups = num_rows * per_row;
        for (int64_t g0 = 0; g0 < num_groups; g0 += LANES) {
            const int64_t used = std::min<int64_t>(LANES, num_groups - g0);
            // A short last group, and lanes without a group, are filled up with zeros, as rounding.py's caller does.
            if (used < LANES || columns % group) std::fill(weights, weights + size, Floats{});
            for (int64_t l = 0; l < used; ++l) {
                const int64_t row = first_row + (g0 + l) / per_row, start = (g0 + l) % per_row * group;
                for (int64_t i = 0; i < std::min(size, columns - start); ++i) weights[i][l] = w[row * columns + start + i];
            }
            const Groups groups{weights, size, terms, terms + size};
            const Choice best =
                symmetric ? choose_symmetric(groups, scale_search, chosen) : choose_asymmetric(groups, scale_search, chosen);
            for (int64_t l = 0; l < used; ++l) {
                const int64_t row = (g0 + l) / per_row, start = (g0 + l) % per_row * group;
                scales[first_row * per_row + g0 + l] = f32_to_f16(best.scale[l]);
                if (!symmetric) zero_points[first_row * per_row + g0 + l] = uint8_t(best.zero[l]);
                for (int64_t i = 0; i < std::min(size, columns - start); ++i)
                    row_codes[row * columns + start + i] = uint8_t(chosen[i][l]);
            }
        }
        for (int64_t row = 0; row < num_rows; ++row)
            pack_row(row_codes + row * columns, columns, false, codes + (first_row + row) * ((columns + 1) / 2));
    }
    return SH_OK;
}

int32_t portable_quantize_table16(const float *w, int64_t count, int64_t group, const float *absmax, const float *table,
                                  uint8_t *codes, int32_t threads) {
    if (group < 1) return SH_UNSUPPORTED;
    float bounds[15];
    for (int i = 0; i < 15; ++i) bounds[i] = (table[i] + table[i + 1]) / 2.0f;
    const int team = worthwhile_threads(threads, count);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t start = 0; start < count; start += CHUNK) {  // CHUNK is even: no byte is shared by two chunks
        uint8_t chosen[CHUNK];
        const int64_t end = std::min(count, start + CHUNK);
        for (int64_t i = start; i < end;) {
            const int64_t block = i / group, stop = std::min(end, (block + 1) * group);
            nearest_levels(w + i, stop - i, absmax[block], bounds, chosen + (i - start));
            i = stop;
        }
        pack_row(chosen, end - start, true, codes + start / 2);
    }
    return SH_OK;
}

int32_t portable_block_absmax(const float *w, int64_t count, int64_t group, float *absmax, int32_t threads) {
    if (group < 1) return SH_UNSUPPORTED;
    const int64_t num_blocks = count / group + (count % group != 0);
    const int team = worthwhile_threads(threads, count);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t stop = std::min(group, count - block * group);
        // Magnitudes order like the integers that hold them, and integers have a maximum that vectorises.
        uint32_t top = 0;
        for (int64_t i = 0; i < stop; ++i) top = std::max(top, float_bits(w[block * group + i]) & 0x7fffffffu);
        absmax[block] = bits_float(top);
    }
    return SH_OK;
}

}  // namespace stillhouse::SH_NAMESPACE
