// Matrices of integers in groups with a scale, and perhaps an offset, each: w = n · scale + offset. How
// its numbers lie is told with each matrix, so that those of one layer may differ.
//
// Vectors are the 16-bit integers of integers.h. Products are summed exactly over a unit of neighbours,
// which are of one group, and then scaled and added in float32; what offsets add is the products of them
// and the sums of a vector's units.
#pragma once
#include "integers.h"

namespace {

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

// How many sums products of a row and a vector go into, so that none waits for another.
template <int UNIT>
constexpr int WAYS = UNIT == GROUP ? 1 : 2;

// Add Σ by · n x over 64 columns, of units with a scale each.
template <int UNIT>
__attribute__((always_inline)) inline void add_products(const Wide& w, const int16_t* x, const float* by, F (&to)[WAYS<UNIT>]) {
    if constexpr (UNIT == GROUP) {
        to[0] = fma(products(w, x), all(by[0]), to[0]);
    } else if constexpr (UNIT == 32) {
#pragma GCC unroll 2
        for (int unit = 0; unit < 2; ++unit) {
            Words sum = no_words();
#pragma GCC unroll 2
            for (int h = unit * HALVES; h < (unit + 1) * HALVES; ++h) sum = pair_products(sum, w.parts[h], words(x + h * WORDS));
            to[unit] = fma(to_float(sum), all(by[unit]), to[unit]);
        }
    } else {
#pragma GCC unroll 4
        for (int h = 0; h < 2 * HALVES; ++h) {
            const F one = to_float(pair_products(no_words(), w.parts[h], words(x + h * WORDS)));
#if defined(__AVX512F__)
            const F scale = both(by[2 * h], by[2 * h + 1]);
#else
            const F scale = all(by[h]);
#endif
            to[h / HALVES] = fma(one, scale, to[h / HALVES]);
        }
    }
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

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        const auto with = [&](auto numbers, auto unit) { of_kind<Numbers(numbers()), unit()>(x, M, from, to, put); };
        const i64 unit = std::min(layout.group, GROUP);
        switch (layout.numbers) {
            case BYTES:
                if (unit == 16) return with(Constant<BYTES>(), Constant<16>());
                if (unit == 32) return with(Constant<BYTES>(), Constant<32>());
                return with(Constant<BYTES>(), Constant<GROUP>());
            case NIBBLES:
                if (unit == 32) return with(Constant<NIBBLES>(), Constant<32>());
                return with(Constant<NIBBLES>(), Constant<GROUP>());
            case IQ4:
                return with(Constant<IQ4>(), Constant<32>());
        }
    }

  private:
    template <i64 N>
    using Constant = std::integral_constant<i64, N>;

    // What all rows have in common.
    struct Sizes {
        i64 G, stride;
        int group;  // a power of two
        Places of_groups, of_vectors;
    };

    template <Numbers N, int UNIT>
    void of_kind(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        constexpr int MOST = LANES == 16 ? 4 : 2;
        const Sizes sizes{layout.groups(I), layout.row_bytes(I), __builtin_ctzll(uint64_t(layout.group)),
                          spread(UNIT, layout.group), spread(UNIT, GROUP)};
        i64 o = from;
        for (; M > 1 && o + 2 <= to; o += 2)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<N, UNIT, 2, n()>(x, m, o, sizes, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<N, UNIT, 1, n()>(x, m, o, sizes, put); });
    }

    // R rows by MB vectors. Scales of as many units as a vector has lanes are made ready at once.
    template <Numbers N, int UNIT, int R, int MB>
    void block(const Input* x, i64 m0, i64 o, const Sizes& sizes, const Products& put) const {
        constexpr i64 CHUNK = LANES * UNIT, STEP = N == BYTES ? GROUP : GROUP / 2;
        const i64 G = sizes.G, stride = sizes.stride;
        const char* p = q + o * stride;
        const char* next = p + R * stride;
        F acc[R][MB][WAYS<UNIT>];
        for (auto& row : acc)
            for (auto& ways : row)
                for (F& sum : ways) sum = zero();
        for (i64 start = 0; start < I; start += CHUNK) {
            const i64 end = std::min(start + CHUNK, I);
            const i64 g = start >> sizes.group, n = ((end - 1) >> sizes.group) - g + 1;
            const i64 s = start / GROUP, spans = (end - 1) / GROUP - s + 1, u = start / UNIT;
            alignas(64) float by[R][MB][LANES];
            for (int r = 0; r < R; ++r) {
                const i64 at = (o + r) * G + g;
                const F scales = taken(load_reals(scale, layout.real, at, n), sizes.of_groups);
                F more = mul(scales, all(-8.0f));
                if (offset) more = taken(load_reals(offset, layout.real, at, n), sizes.of_groups);
                for (int m = 0; m < MB; ++m) {
                    const Input& v = x[m0 + m];
                    store(by[r][m], mul(scales, taken(load(v.x.scale + s, spans), sizes.of_vectors)));
                    if (N == NIBBLES || offset) acc[r][m][0] = fma(more, load(v.template sums<UNIT>() + u), acc[r][m][0]);
                }
            }
            for (i64 i = start; i < end; i += GROUP) {
                const i64 at = i / GROUP * STEP;
                Wide w[R];
                if (N == BYTES && __builtin_expect(i + GROUP > I, 0)) {
                    for (int r = 0; r < R; ++r) w[r] = last(p + r * stride + at, I - i);
                } else {
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) {
                        if (R == 1 && at % 64 == 0) prefetch<_MM_HINT_T1>(p + at, AHEAD);
                        if (R > 1 && m0 == 0) prefetch<_MM_HINT_T1>(next + at * R + r * STEP, 0);
                        w[r] = widened<N>(p + r * stride + at);
                    }
                }
                const i64 unit = (i - start) / UNIT;
#pragma GCC unroll 4
                for (int m = 0; m < MB; ++m) {
                    const int16_t* xs = x[m0 + m].x.values + i;
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) add_products<UNIT>(w[r], xs, by[r][m] + unit, acc[r][m]);
                }
            }
        }
        for (int m = 0; m < MB; ++m)
            for (int r = 0; r < R; ++r) {
                F total = acc[r][m][0];
                if constexpr (WAYS<UNIT> == 2) total = add(total, acc[r][m][1]);
                put(m0 + m, o + r, sum(total));
            }
    }

    // Which of several values, one for each `wide` columns, is that of each unit.
    static Places spread(i64 unit, i64 wide) {
        alignas(64) int32_t at[LANES];
        for (int l = 0; l < LANES; ++l) at[l] = int32_t(l * unit / wide);
        return places(at);
    }

    // What is left of a row of bytes, behind which another one lies or nothing.
    static Wide last(const char* p, i64 n) {
        alignas(64) char rest[GROUP] = {};
        std::memcpy(rest, p, size_t(n));
        return widened<BYTES>(rest);
    }
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

}  // namespace
