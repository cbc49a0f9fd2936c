// Vectors of the widest instruction set this file is compiled for.
//
// Floats are computed in float32. A vector of bfloat16 is held as pairs: lane i has elements 2i and
// 2i + 1, and only ever meets another such vector in `dot`, where the order of a sum is free.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace quintet {

using i64 = int64_t;
struct bf16 {
    uint16_t bits;
};

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline float widen(float x) { return x; }

// To nearest, ties to even, as torch rounds.
inline void narrow(float x, bf16* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, float* to) { *to = x; }
template <class T>
inline float rounded(float x) {
    T y;
    narrow(x, &y);
    return widen(y);
}

template <int HINT>
inline void prefetch(const void* p, i64 offset) {
    _mm_prefetch(static_cast<const char*>(p) + offset, _mm_hint(HINT));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

constexpr int LANES = 16;
using F = __m512;
using Pairs = __m512i;
inline F zero() { return _mm512_setzero_ps(); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F floor_of(F a) { return _mm512_roundscale_ps(a, 1); }
inline F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }
// In the order in which `sums` adds.
inline float sum(F a) {
    a = add(a, _mm512_permute_ps(a, 0x4E));
    a = add(a, _mm512_permute_ps(a, 0xB1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline float largest(F a) { return _mm512_reduce_max_ps(a); }

inline __mmask16 below(i64 n) { return __mmask16((1u << n) - 1); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const float* p, i64 n) { return _mm512_maskz_loadu_ps(below(n), p); }
inline F load(const bf16* p) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline F load(const bf16* p, i64 n) {
    __m256i x = _mm256_maskz_loadu_epi16(below(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, F x, i64 n) { _mm512_mask_storeu_ps(p, below(n), x); }
inline __m256i halves(F x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i b = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    b = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    b = _mm512_srli_epi32(b, 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(b, nan, 0x7FC0));
#endif
}
inline void store(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(x)); }
inline void store(bf16* p, F x, i64 n) { _mm256_mask_storeu_epi16(p, below(n), halves(x)); }

inline Pairs load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
inline Pairs load_pairs(const bf16* p, i64 n) {
    return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
}
inline F dot(F sum, Pairs a, Pairs b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32(int(0xFFFF0000u));
    F ae = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    F be = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    F ao = _mm512_castsi512_ps(_mm512_and_si512(a, high));
    F bo = _mm512_castsi512_ps(_mm512_and_si512(b, high));
    return _mm512_fmadd_ps(ao, bo, _mm512_fmadd_ps(ae, be, sum));
#endif
}

#else  // AVX2 and FMA

constexpr int LANES = 8;
using F = __m256;
using Pairs = __m256i;
inline F zero() { return _mm256_setzero_ps(); }
inline F all(float x) { return _mm256_set1_ps(x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F floor_of(F a) { return _mm256_floor_ps(a); }
// For n from -126 to 127.
inline F scale_by_power(F a, F n) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
}
inline float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float largest(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

template <class T, int N>
struct Padded {
    alignas(32) T values[N] = {};
    Padded(const T* p, i64 n) { std::memcpy(values, p, size_t(n) * sizeof(T)); }
};
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const float* p, i64 n) { return load(Padded<float, 8>(p, n).values); }
inline F load(const bf16* p) {
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline F load(const bf16* p, i64 n) { return load(Padded<bf16, 8>(p, n).values); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void store(bf16* p, F x) {
    __m256i b = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    b = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    b = _mm256_srli_epi32(b, 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    b = _mm256_blendv_epi8(b, _mm256_set1_epi32(0x7FC0), nan);
    b = _mm256_permute4x64_epi64(_mm256_packus_epi32(b, b), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(b));
}
template <class T>
inline void store(T* p, F x, i64 n) {
    alignas(32) T values[8];
    store(values, x);
    std::memcpy(p, values, size_t(n) * sizeof(T));
}

inline Pairs load_pairs(const bf16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Pairs load_pairs(const bf16* p, i64 n) { return load_pairs(Padded<bf16, 16>(p, n).values); }
inline F dot(F sum, Pairs a, Pairs b) {
    const __m256i high = _mm256_set1_epi32(int(0xFFFF0000u));
    F ae = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
    F be = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    F ao = _mm256_castsi256_ps(_mm256_and_si256(a, high));
    F bo = _mm256_castsi256_ps(_mm256_and_si256(b, high));
    return _mm256_fmadd_ps(ao, bo, _mm256_fmadd_ps(ae, be, sum));
}

#endif

// What a dot product reads at once: pairs of bfloat16, or float32.
template <class T>
struct Chunk;
template <>
struct Chunk<bf16> {
    using V = Pairs;
    static constexpr i64 SIZE = 2 * LANES;
    static V at(const bf16* p) { return load_pairs(p); }
    static V at(const bf16* p, i64 n) { return load_pairs(p, n); }
    static F dot_to(F sum, V a, V b) { return dot(sum, a, b); }
};
template <>
struct Chunk<float> {
    using V = F;
    static constexpr i64 SIZE = LANES;
    static V at(const float* p) { return load(p); }
    static V at(const float* p, i64 n) { return load(p, n); }
    static F dot_to(F sum, V a, V b) { return fma(a, b, sum); }
};

// e^x, to a relative 2e-7; 0 and inf beyond float32's range.
inline F exp_of(F x) {
    // In this order a NaN comes through both.
    x = min(all(88.3f), max(all(-87.3f), x));
    F n = floor_of(fma(x, all(1.44269504f), all(0.5f)));
    F r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    F y = all(1.9875691500e-4f);
    y = fma(y, r, all(1.3981999507e-3f));
    y = fma(y, r, all(8.3334519073e-3f));
    y = fma(y, r, all(4.1665795894e-2f));
    y = fma(y, r, all(1.6666665459e-1f));
    y = fma(y, r, all(5.0000001201e-1f));
    y = fma(fma(y, r, all(1.0f)), r, all(1.0f));
    return scale_by_power(y, n);
}
// x Φ(x) = max(x, 0) - |x|/2 · erfc(|x| / √2), with erfc from Abramowitz and Stegun, 7.1.26.
inline F gelu(F x) {
    const F z = mul(max(x, sub(zero(), x)), all(0.70710678f));
    const F t = div(all(1.0f), fma(z, all(0.3275911f), all(1.0f)));
    F y = all(1.061405429f);
    y = fma(y, t, all(-1.453152027f));
    y = fma(y, t, all(1.421413741f));
    y = fma(y, t, all(-0.284496736f));
    y = fma(y, t, all(0.254829592f));
    const F tail = mul(mul(y, t), exp_of(sub(zero(), mul(z, z))));
    return sub(max(zero(), x), mul(mul(z, all(0.70710678f)), tail));
}
inline F silu(F x) { return div(x, add(all(1.0f), exp_of(sub(zero(), x)))); }

// The sums of four vectors, one beside the other.
inline void sums(F a, F b, F c, F d, float* to) {
#if defined(__AVX512F__)
    const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const F all = add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

// The lanes in the order in which `sum` adds them: two neighbours, then pairs of neighbours, and so on.
#if defined(__AVX512F__)
constexpr int ORDER[] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
#else
constexpr int ORDER[] = {0, 4, 2, 6, 1, 5, 3, 7};
#endif

// The part [from, to) of n items that is this thread's.
struct Share {
    i64 from, to;
    Share(i64 n, i64 thread, i64 threads) : from(n * thread / threads), to(n * (thread + 1) / threads) {}
};

}  // namespace quintet
