// Matrices of integers in groups with a scale, and perhaps an offset, each: w = n · scale + offset. How
// its numbers lie is told with each matrix, so that those of one layer may differ.
//
// Vectors are the 16-bit integers of integers.h. Products are summed exactly over a unit of neighbours,
// which are of one group, and then scaled and added in float32; what offsets add is the products of them
// and the sums of a vector's units.
#pragma once
#include "int8.h"
#include "int4.h"

namespace quintet {

// What numbers are, and of what type scales and offsets; as quintet/kernels/linear.py numbers them.
enum Numbers : i64 { BYTES, NIBBLES, IQ4 };
enum Real : i64 { F16, BF16, F32 };

// What is told of a matrix in one number: kinds of numbers and scales, and how many neighbours a group is.
struct Layout {
    Numbers numbers;
    Real real;
    i64 group;

    Layout(i64 code = 0) : numbers(Numbers(code & 15)), real(Real(code >> 4 & 15)), group(code >> 8) {}
    bool known() const {
        const bool power = group > 0 && !(group & (group - 1));
        return numbers <= IQ4 && real <= F32 && power && group >= (numbers == BYTES ? 16 : 32);
    }
    i64 row_bytes(i64 I) const { return numbers == BYTES ? I : (I + GROUP - 1) / GROUP * (GROUP / 2); }
    i64 groups(i64 I) const { return (I + group - 1) / group; }
    i64 real_bytes() const { return real == F32 ? 4 : 2; }
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
inline F load_halves(const uint16_t* p, i64 n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(below(n), p)); }
// Lane l of x taken from lane places[l].
using Places = __m512i;
inline F taken(F x, Places places) { return _mm512_permutexvar_ps(places, x); }
inline Places places(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Words iq4_words(const uint8_t* p, bool high) {
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113));
    __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (high) n = _mm256_srli_epi16(n, 4);
    return _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(levels, _mm256_and_si256(n, _mm256_set1_epi8(15))));
}
// Two scales, of the two halves of 32 products.
inline F both(float low, float high) {
    return _mm512_insertf32x8(all(low), _mm256_set1_ps(high), 1);
}
#else
inline F load_halves(const uint16_t* p, i64 n) {
    uint16_t some[LANES] = {};
    std::memcpy(some, p, size_t(n) * sizeof(uint16_t));
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(some)));
}
using Places = __m256i;
inline F taken(F x, Places places) { return _mm256_permutevar8x32_ps(x, places); }
inline Places places(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Words iq4_words(const uint8_t* p, bool high) {
    const __m128i levels = _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
    __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (high) n = _mm_srli_epi16(n, 4);
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(levels, _mm_and_si128(n, _mm_set1_epi8(15))));
}
#endif

inline F load_reals(const char* p, Real real, i64 at, i64 n) {
    switch (real) {
        case F16: return load_halves(reinterpret_cast<const uint16_t*>(p) + at, n);
        case BF16: return load(reinterpret_cast<const bf16*>(p) + at, n);
        default: return load(reinterpret_cast<const float*>(p) + at, n);
    }
}

// A rounded vector, and what its units of 16, 32 and 64 numbers sum to.
struct Summed {
    Rounded x;
    const float *by_16, *by_32, *by_64;

    template <int UNIT>
    const float* sums() const { return UNIT == 16 ? by_16 : UNIT == 32 ? by_32 : by_64; }
};

// 64 weights, widened, in the order of their columns.
template <Numbers N>
Wide widened(const char* p) {
    Wide w;
#pragma GCC unroll 4
    for (int h = 0; h < 2 * HALVES; ++h) {
        if constexpr (N == BYTES) {
            w.parts[h] = widen_signed(reinterpret_cast<const int8_t*>(p) + h * WORDS);
        } else {
            const uint8_t* from = reinterpret_cast<const uint8_t*>(p) + h % HALVES * WORDS;
            if constexpr (N == IQ4) w.parts[h] = iq4_words(from, h >= HALVES);
            else if (h < HALVES) w.parts[h] = low_half(widen_unsigned(from));
            else w.parts[h] = high_half(widen_unsigned(from));
        }
    }
    return w;
}

struct Groups {
    using Input = Summed;
    using Stored = char;
    using Scale = char;
    const char *q, *scale, *offset;
    i64 I;
    Layout layout;

    i64 bytes() const { return layout.row_bytes(I) + layout.groups(I) * layout.real_bytes() * (offset ? 2 : 1); }
    static Bytes bytes(i64 O, i64 I, i64 code) {
        const Layout layout(code);
        if (!layout.known()) return {-1, -1};
        return {O * layout.row_bytes(I), O * layout.groups(I) * layout.real_bytes()};
    }

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const;
};

template <>
struct Inputs<Groups> {
    std::vector<Summed> of;

    Inputs(i64 M, i64 I) : of(size_t(M)), rounded_(M, I), I_(I), sums_(size_t(M * (room(16) + room(32) + room(64)))) {
        for (i64 m = 0; m < M; ++m) {
            const float* sums = first(m);
            of[size_t(m)] = {rounded_.of[size_t(m)], sums, sums + room(16), sums + room(16) + room(32)};
        }
    }
    template <class T>
    Inputs(const T* x, i64 M, i64 I, i64) : Inputs(M, I) {
        fill(x, M, I, 0, 1);
    }

    template <class T>
    void fill(const T* x, i64 M, i64 I, i64 thread, i64 threads) {
        rounded_.fill(x, M, I, thread, threads);
        QuantizedInputs::each_span(M, I, thread, threads, [&](i64 m, i64 start, i64) {
            for (i64 g = start / GROUP; g * GROUP < std::min(start + SPAN, I); ++g) add_up(m, g);
        });
    }

  private:
    QuantizedInputs rounded_;
    i64 I_;
    std::vector<float> sums_;

    void add_up(i64 m, i64 g) {
        const Rounded& x = of[size_t(m)].x;
        const int16_t* values = x.group(g);
        int32_t total[4] = {};
        for (int unit = 0; unit < 4; ++unit)
            for (int i = 0; i < 16; ++i) total[unit] += values[16 * unit + i];
        float* to = first(m);
        for (int unit = 0; unit < 4; ++unit) to[4 * g + unit] = float(total[unit]) * x.scale[g];
        to += room(16);
        for (int unit = 0; unit < 2; ++unit) to[2 * g + unit] = float(total[2 * unit] + total[2 * unit + 1]) * x.scale[g];
        to += room(32);
        to[g] = float(total[0] + total[1] + total[2] + total[3]) * x.scale[g];
    }

    float* first(i64 m) { return sums_.data() + m * (room(16) + room(32) + room(64)); }

    // Whole vectors of units.
    i64 room(i64 unit) const {
        const i64 units = (I_ + GROUP - 1) / GROUP * (GROUP / unit);
        return (units + LANES - 1) / LANES * LANES;
    }
};

}  // namespace quintet
