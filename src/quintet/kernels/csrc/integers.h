// Vectors as matrices of integers take them.
//
// A vector is rounded to 16-bit integers, each 256 neighbours with a scale of their own, or each 64
// where the numbers of one 64 are far larger than those of another: always far finer than the bfloat16
// it comes in. Its products with 8-bit weights are summed exactly in 32 bits over what has one scale,
// those with 4-bit weights over 64, then scaled and added in float32.
#pragma once
#include "matrix.h"

namespace quintet {

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
// The sum of all lanes, and of those of four vectors.
inline int32_t total(Words x) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
#else
    const __m256i half = x;
#endif
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
#if defined(__AVX512F__)
inline __m128i totals(Words a, Words b, Words c, Words d) {
    const Words ab = add_words(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Words cd = add_words(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const Words four = add_words(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
#endif

// acc[r] += by · the sum of all lanes of sums[r].
template <int R>
__attribute__((always_inline)) inline void add_totals(const Words (&sums)[R], float by, float* acc) {
#if defined(__AVX512F__)
    if constexpr (R == 4) {
        const __m128 four = _mm_cvtepi32_ps(totals(sums[0], sums[1], sums[2], sums[3]));
        return _mm_storeu_ps(acc, _mm_fmadd_ps(four, _mm_set1_ps(by), _mm_loadu_ps(acc)));
    }
#endif
    for (int r = 0; r < R; ++r) acc[r] = std::fma(float(total(sums[r])), by, acc[r]);
}

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

}  // namespace quintet
