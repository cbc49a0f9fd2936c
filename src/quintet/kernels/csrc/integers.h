// Matrices of 8-bit and 4-bit integers.
//
// A vector is rounded to 16-bit integers, each 256 neighbours with a scale of their own, or each 64
// where the numbers of one 64 are far larger than those of another: always far finer than the bfloat16
// it comes in. Its products with 8-bit weights are summed exactly in 32 bits over what has one scale,
// those with 4-bit weights over 64, then scaled and added in float32.
#pragma once
#include "matrix.h"

namespace {

// How far ahead of its use a line of integers is asked for, in bytes, into the second cache: the
// first has too few places for lines on their way, and they then come at half the speed.
constexpr i64 AHEAD = 8192;
constexpr i64 GROUP = 64, SPAN = 256;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr int HALVES = 1;  // vectors of 16-bit integers that hold 32 of them
using Words = __m512i;
inline Words words(const int16_t* p) { return _mm512_load_si512(p); }
inline Words widen_signed(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Words widen_unsigned(const uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Words low_half(Words x) { return _mm512_and_si512(x, _mm512_set1_epi16(15)); }
inline Words high_half(Words x) { return _mm512_srli_epi16(x, 4); }
inline Words no_words() { return _mm512_setzero_si512(); }
inline Words pair_products(Words sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
inline F to_float(Words x) { return _mm512_cvtepi32_ps(x); }
inline Words ones() { return _mm512_set1_epi16(1); }
inline Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline F load_bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F load_low(const uint8_t* p) {
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    x = _mm512_and_si512(x, _mm512_set1_epi32(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(8)));
}
inline F load_high(const uint8_t* p) {
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(x, 4), _mm512_set1_epi32(8)));
}
inline void store_words(int16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
#else
constexpr int HALVES = 2;
using Words = __m256i;
inline Words words(const int16_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
inline Words widen_signed(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Words widen_unsigned(const uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Words low_half(Words x) { return _mm256_and_si256(x, _mm256_set1_epi16(15)); }
inline Words high_half(Words x) { return _mm256_srli_epi16(x, 4); }
inline Words no_words() { return _mm256_setzero_si256(); }
inline Words pair_products(Words sum, Words a, Words b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
inline F to_float(Words x) { return _mm256_cvtepi32_ps(x); }
inline Words ones() { return _mm256_set1_epi16(1); }
inline Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline F load_bytes(const int8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F load_low(const uint8_t* p) {
    __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    x = _mm256_and_si256(x, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(8)));
}
inline F load_high(const uint8_t* p) {
    __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(x, 4), _mm256_set1_epi32(8)));
}
inline void store_words(int16_t* p, F x) {
    __m256i w = _mm256_cvtps_epi32(x);
    w = _mm256_permute4x64_epi64(_mm256_packs_epi32(w, w), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(w));
}
#endif
constexpr int WORDS = 32 / HALVES;  // 16-bit integers a vector holds

// A vector in groups of 64 neighbours, x ≈ values · scale, with zeros behind its end. Four groups are a
// span, of which `splits` says whether they have scales of their own. `offset` is what weights stored as w + 8 make of it too much, -8 · Σ values · scale. Scales and offsets come
// in whole vectors: zeros behind the last group's.
struct Rounded {
    const int16_t* values;
    const float* scale;
    const float* offset;
    const char* splits;

    const int16_t* group(i64 g) const { return values + g * GROUP; }
};

// A scale serves a group if the largest of what it serves is at most so many times the group's own.
constexpr float ALIKE = 16.0f;

// The n numbers of a span.
template <class T>
void quantize(const T* x, i64 n, int16_t* rounded, float* scale, float* offset, char* splits) {
    constexpr i64 VECTORS = GROUP / LANES;
    F values[SPAN / LANES], sick = zero();
    const i64 groups = (n + GROUP - 1) / GROUP;
    float tops[SPAN / GROUP], top = 0.0f;
    for (i64 g = 0; g < groups; ++g) {
        F most = zero();
        for (i64 j = g * VECTORS; j < (g + 1) * VECTORS; ++j) {
            const i64 left = n - j * LANES;
            const T* p = x + j * LANES;
            const F v = left >= LANES ? load(p) : left > 0 ? load(p, left) : zero();
            values[j] = v;
            most = max(most, max(v, sub(zero(), v)));
            sick = fma(v, zero(), sick);
        }
        tops[g] = largest(most);
        top = std::max(top, tops[g]);
    }
    *splits = 0;
    for (i64 g = 0; g < groups; ++g) *splits |= char(tops[g] > 0 && top > ALIKE * tops[g]);
    // A group of zeros stays one; an infinity or a NaN makes NaN of every product.
    const float broken = sum(sick);
    for (i64 g = 0; g < groups; ++g) {
        const float most = *splits ? tops[g] : top, by = most > 0 ? 32767.0f / most : 0.0f;
        for (i64 j = g * VECTORS; j < (g + 1) * VECTORS; ++j) store_words(rounded + j * LANES, mul(values[j], all(by)));
        Words total = no_words();
        for (int h = 0; h < 2 * HALVES; ++h)
            total = pair_products(total, words(rounded + g * GROUP + h * WORDS), ones());
        scale[g] = most / 32767.0f + broken;
        offset[g] = -8.0f * sum(to_float(total)) * scale[g];
    }
}

// 64 weights, widened.
struct Wide {
    Words parts[2 * HALVES];
};

// Σ w x over a group, lane by lane.
inline F products(const Wide& w, const int16_t* x) {
    Words sum = no_words();
#pragma GCC unroll 4
    for (int h = 0; h < 2 * HALVES; ++h) sum = pair_products(sum, w.parts[h], words(x + h * WORDS));
    return to_float(sum);
}

// Sums of R rows and MB vectors: in registers, or in memory where those are taken.
template <int R, int MB, bool MEMORY>
struct Sums {
    F of[R][MB];
    Sums() {
        for (auto& row : of)
            for (F& sum : row) sum = zero();
    }
    F get(int r, int m) const { return of[r][m]; }
    void set(int r, int m, F sum) { of[r][m] = sum; }
    void settle() {}
};
template <int R, int MB>
struct Sums<R, MB, true> {
    alignas(64) float of[R][MB][LANES] = {};
    F get(int r, int m) const { return load(of[r][m]); }
    void set(int r, int m, F sum) { store(of[r][m], sum); }
    void settle() { asm volatile("" : : "r"(&of[0][0][0]) : "memory"); }
};

// q (O, I) with a scale for each row.
struct Int8 {
    using Input = Rounded;
    using Stored = int8_t;
    using Scale = float;
    const int8_t* q;
    const float* scale;
    i64 I;

    i64 bytes() const { return I; }
    static Bytes bytes(i64 O, i64 I, i64) { return {O * I, O * i64(sizeof(float))}; }

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        constexpr int MOST = LANES == 16 ? 4 : 2, ROWS = LANES == 16 ? 4 : 2;
        i64 o = from;
        for (; M > 1 && o + ROWS <= to; o += ROWS)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<ROWS, n()>(x, m, o, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<1, n()>(x, m, o, put); });
    }

  private:
    // R rows by MB vectors, whose products are integers over a span. What is fetched meanwhile lies ahead
    // of a single row, or is the next R rows in the order in which memory has them.
    template <int R, int MB>
    void block(const Input* x, i64 m0, i64 o, const Products& put) const {
        const int8_t* p = q + o * I;
        const int8_t* next = p + R * I;
        // Integers have one sum whatever the order: of few, several at a time.
        constexpr int WAYS = R * MB == 1 ? 4 : R * MB <= 8 ? 2 : 1;
        Sums<R, MB, (R * MB > 8)> acc;
        for (i64 start = 0; start < I; start += SPAN) {
            Words all_sums[WAYS][R][MB];
            for (auto& sums : all_sums)
                for (int r = 0; r < R; ++r)
                    for (int m = 0; m < MB; ++m) sums[r][m] = no_words();
            const auto step = [&](const int8_t* from, i64 apart, i64 at, Words (&sums)[R][MB]) __attribute__((always_inline)) {
                Words w[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) w[r] = widen_signed(from + r * apart);
#pragma GCC unroll 6
                for (int m = 0; m < MB; ++m) {
                    const Words xm = words(x[m0 + m].values + at);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sums[r][m] = pair_products(sums[r][m], w[r], xm);
                }
            };
            // The registers are for the integers.
            acc.settle();
            const auto add_up = [&](int m, float by) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    Words total = all_sums[0][r][m];
                    for (int way = 1; way < WAYS; ++way) total = add_words(total, all_sums[way][r][m]);
                    acc.set(r, m, fma(to_float(total), all(by), acc.get(r, m)));
                    for (auto& sums : all_sums) sums[r][m] = no_words();
                }
            };
            const auto end_group = [&](i64 at) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int m = 0; m < MB; ++m)
                    if (__builtin_expect(x[m0 + m].splits[start / SPAN], 0)) add_up(m, x[m0 + m].scale[at / GROUP]);
            };
            const i64 end = std::min(start + SPAN, I);
            i64 i = start;
            for (; i + GROUP <= end; i += GROUP) {
                if (R == 1) prefetch<_MM_HINT_T1>(p + i, AHEAD);
                else if (m0 == 0)
                    for (int r = 0; r < R; ++r) prefetch<_MM_HINT_T1>(next + i * R + r * GROUP, 0);
#pragma GCC unroll 4
                for (int h = 0; h < 2 * HALVES; ++h) step(p + i + h * WORDS, I, i + h * WORDS, all_sums[h % WAYS]);
                end_group(i);
            }
            if (i < end) {
                alignas(64) int8_t rest[R][GROUP] = {};
                for (int r = 0; r < R; ++r) std::memcpy(rest[r], p + r * I + i, size_t(end - i));
                for (int h = 0; h < 2 * HALVES; ++h) step(rest[0] + h * WORDS, GROUP, i + h * WORDS, all_sums[h % WAYS]);
                end_group(i);
            }
#pragma GCC unroll 4
            for (int m = 0; m < MB; ++m)
                if (!x[m0 + m].splits[start / SPAN]) add_up(m, x[m0 + m].scale[start / GROUP]);
        }
        for (int m = 0; m < MB; ++m) {
            float made[R];
            const auto lanes = [&](int r) { return acc.get(r, m); };
            row_sums<R>(lanes, made);
            for (int r = 0; r < R; ++r) put(m0 + m, o + r, made[r] * scale[o + r]);
        }
    }
};

// Groups of 64 along each row, 32 bytes a group: byte j has number j + 8 low and j + 32 high; a
// scale for each group.
struct Int4 {
    using Input = Rounded;
    using Stored = uint8_t;
    using Scale = bf16;
    const uint8_t* q;
    const bf16* scale;
    i64 I;

    i64 groups() const { return (I + GROUP - 1) / GROUP; }
    i64 bytes() const { return groups() * (GROUP / 2 + 2); }
    static Bytes bytes(i64 O, i64 I, i64) {
        const i64 G = O * ((I + GROUP - 1) / GROUP);
        return {G * (GROUP / 2), G * i64(sizeof(bf16))};
    }

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        constexpr int MOST = LANES == 16 ? 6 : 2;
        if (M == 1) {
            for (i64 o = from; o < to; ++o) block<1, 1, true>(x, 0, o, put);
            return;
        }
        i64 o = from;
        for (; o + 2 <= to; o += 2)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<2, n(), false>(x, m, o, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<1, n(), false>(x, m, o, put); });
    }

  private:
    static Wide wide(const uint8_t* p) {
        Wide w;
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            const Words both = widen_unsigned(p + h * WORDS);
            w.parts[h] = low_half(both);
            w.parts[HALVES + h] = high_half(both);
        }
        return w;
    }

    template <int R, int MB, bool LINE>
    void block(const Input* x, i64 m0, i64 o, const Products& put) const {
        const i64 G = groups(), stride = G * (GROUP / 2);
        const uint8_t* p = q + o * stride;
        const uint8_t* next = p + R * stride;
        F acc[R][MB];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < MB; ++m) acc[r][m] = zero();
        for (i64 g0 = 0; g0 < G; g0 += LANES) {
            const i64 n = std::min(i64(LANES), G - g0);
            alignas(64) float by[R][MB][LANES];
            for (int r = 0; r < R; ++r) {
                const bf16* s = scale + (o + r) * G + g0;
                const F scales = n == LANES ? load(s) : load(s, n);
                for (int m = 0; m < MB; ++m) {
                    store(by[r][m], mul(scales, load(x[m0 + m].scale + g0)));
                    acc[r][m] = fma(scales, load(x[m0 + m].offset + g0), acc[r][m]);
                }
            }
            for (i64 j = 0; j < n; ++j) {
                const i64 g = g0 + j;
                Wide w[R];
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) {
                    if (LINE && g % 2 == 0) prefetch<_MM_HINT_T1>(p + g * 32, AHEAD);
                    if (!LINE && m0 == 0) prefetch<_MM_HINT_T1>(next + (g * R + r) * 32, 0);
                    w[r] = wide(p + r * stride + g * 32);
                }
#pragma GCC unroll 6
                for (int m = 0; m < MB; ++m) {
                    const int16_t* xg = x[m0 + m].group(g);
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r)
                        acc[r][m] = fma(products(w[r], xg), all(by[r][m][j]), acc[r][m]);
                }
            }
        }
        for (int m = 0; m < MB; ++m)
            for (int r = 0; r < R; ++r) put(m0 + m, o + r, sum(acc[r][m]));
    }
};

struct QuantizedInputs {
    std::vector<Words> values;  // of a type that is aligned as loads want it
    std::vector<float> scales, offsets;
    std::vector<char> splits;
    std::vector<Rounded> of;

    QuantizedInputs(i64 M, i64 I)
        : values(size_t(M * groups(I) * 2 * HALVES)),
          scales(size_t(M * room(I))),
          offsets(size_t(M * room(I))),
          splits(size_t(M * spans(I))),
          of(size_t(M)) {
        for (i64 m = 0; m < M; ++m)
            of[size_t(m)] = {group(m * groups(I)), scales.data() + m * room(I),
                             offsets.data() + m * room(I), splits.data() + m * spans(I)};
    }
    template <class T>
    QuantizedInputs(const T* x, i64 M, i64 I, i64) : QuantizedInputs(M, I) {
        fill(x, M, I, 0, 1);
    }

    template <class T>
    void fill(const T* x, i64 M, i64 I, i64 thread, i64 threads) {
        const i64 G = groups(I);
        each_span(M, I, thread, threads, [&](i64 m, i64 start, i64 at) {
            const i64 g = start / GROUP;
            quantize(x + m * I + start, std::min(SPAN, I - start), group(m * G + g),
                     &scales[size_t(m * room(I) + g)], &offsets[size_t(m * room(I) + g)], &splits[size_t(at)]);
        });
    }

    // The spans that are a thread's: of which vector, where each begins, and the how many-th of all it is.
    template <class Fn>
    static void each_span(i64 M, i64 I, i64 thread, i64 threads, Fn&& fn) {
        const Share mine(M * spans(I), thread, threads);
        for (i64 at = mine.from; at < mine.to; ++at) fn(at / spans(I), at % spans(I) * SPAN, at);
    }

  private:
    static i64 groups(i64 I) { return (I + GROUP - 1) / GROUP; }
    static i64 spans(i64 I) { return (I + SPAN - 1) / SPAN; }
    static i64 room(i64 I) { return (groups(I) + LANES - 1) / LANES * LANES; }
    int16_t* group(i64 at) {
        return reinterpret_cast<int16_t*>(values.data() + at * 2 * HALVES);
    }
};
template <>
struct Inputs<Int8> : QuantizedInputs {
    using QuantizedInputs::QuantizedInputs;
};
template <>
struct Inputs<Int4> : QuantizedInputs {
    using QuantizedInputs::QuantizedInputs;
};

}  // namespace
