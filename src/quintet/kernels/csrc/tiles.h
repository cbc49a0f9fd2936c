// What products of many rows add to simd.h: pairs of rows in lanes, and several sums at once.
#pragma once
#include <vector>

#include "simd.h"

namespace quintet {

// Both elements of a pair in every lane.
inline Pairs same_pair(const void* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
#if defined(__AVX512F__)
    return _mm512_set1_epi32(bits);
#else
    return _mm256_set1_epi32(bits);
#endif
}

inline void store_pairs(void* p, Pairs x) { std::memcpy(p, &x, sizeof(x)); }
inline Pairs load_lanes(const uint32_t* p) {
    Pairs x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

#if defined(__AVX512F__)
// rows[i] lane j <- rows[j] lane i.
inline void transpose(Pairs* rows) {
    Pairs t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        const Pairs *a = t + 4 * i, *b = a + 2;
        Pairs* to = rows + 4 * i;
        to[0] = _mm512_unpacklo_epi64(a[0], b[0]);
        to[1] = _mm512_unpackhi_epi64(a[0], b[0]);
        to[2] = _mm512_unpacklo_epi64(a[1], b[1]);
        to[3] = _mm512_unpackhi_epi64(a[1], b[1]);
    }
    for (int i = 0; i < 8; ++i) {
        const Pairs *a = rows + i / 4 * 8 + i % 4, *b = a + 4;
        Pairs* to = t + i / 4 * 8 + i % 4;
        to[0] = _mm512_shuffle_i32x4(*a, *b, 0x88);
        to[4] = _mm512_shuffle_i32x4(*a, *b, 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        Pairs* to = rows + i % 4 + i / 4 * 4;
        to[0] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        to[8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}
#else
inline void transpose(Pairs* rows) {
    uint32_t from[LANES][LANES], to[LANES][LANES];
    std::memcpy(from, rows, sizeof(from));
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) to[i][j] = from[j][i];
    std::memcpy(rows, to, sizeof(to));
}
#endif

// How many vectors of pairs go along a row of I numbers, the last one filled up with zeros.
inline i64 steps(i64 I) { return (I + 2 * LANES - 1) / (2 * LANES); }

// Two rows of 2 LANES elements, as pairs of one column: not in the order of columns, but in one
// that `columns` undoes.
inline void zip(Pairs a, Pairs b, Pairs* low, Pairs* high) {
#if defined(__AVX512F__)
    *low = _mm512_unpacklo_epi16(a, b);
    *high = _mm512_unpackhi_epi16(a, b);
#else
    *low = _mm256_unpacklo_epi16(a, b);
    *high = _mm256_unpackhi_epi16(a, b);
#endif
}

// Numbers that belong to the lanes of a `zip`, in the order of columns.
inline void columns(F low, F high, F* first, F* second) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i odd =
        _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    *first = _mm512_permutex2var_ps(low, even, high);
    *second = _mm512_permutex2var_ps(low, odd, high);
#else
    *first = _mm256_permute2f128_ps(low, high, 0x20);
    *second = _mm256_permute2f128_ps(low, high, 0x31);
#endif
}

// Lane i holds a[i] and b[i], rounded.
inline Pairs rounded_pairs(F a, F b) {
#if defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
    bf16 one[LANES], two[LANES], both[2 * LANES];
    store(one, a);
    store(two, b);
    for (int i = 0; i < LANES; ++i) both[2 * i] = one[i], both[2 * i + 1] = two[i];
    return load_pairs(both);
#endif
}

// y where x is at least `limit` or not a number, zero elsewhere.
inline F unless_below(F x, float limit, F y) {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(limit), _CMP_NLT_UQ), y);
#else
    return _mm256_and_ps(_mm256_cmp_ps(x, all(limit), _CMP_NLT_UQ), y);
#endif
}

// 2^x to a relative 2e-6 for x up to 127; exactly zero below -126.
inline F exp2_of(F x) {
    const F clamped = max(all(-126.0f), x);
    const F n = floor_of(add(clamped, all(0.5f)));
    const F f = sub(clamped, n);
    F y = all(1.33335581e-3f);
    y = fma(y, f, all(9.61812911e-3f));
    y = fma(y, f, all(5.55041087e-2f));
    y = fma(y, f, all(2.40226507e-1f));
    y = fma(y, f, all(6.93147181e-1f));
    y = fma(y, f, all(1.0f));
    return unless_below(x, -126.0f, scale_by_power(y, n));
}

// The same for x up to 127, to a relative 1e-4: for what is rounded to bfloat16 next.
inline F coarse_exp2_of(F x) {
    // So large that what is left of x is a whole number, in the lowest bits.
    const F shift = all(12582912.0f), n = add(x, shift), f = sub(x, sub(n, shift));
    F y = all(5.51716685e-2f);
    y = fma(y, f, all(2.42611125e-1f));
    y = fma(y, f, all(6.93260968e-1f));
    y = fma(y, f, all(9.99928057e-1f));
#if defined(__AVX512F__)
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
    const __mmask16 there = _mm512_cmp_ps_mask(x, all(-126.0f), _CMP_NLT_UQ);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(there, _mm512_castps_si512(y), power));
#else
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
    return unless_below(x, -126.0f, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power)));
#endif
}

inline bool any_above(F a, F b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#else
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
#endif
}

// Memory that a thread keeps from call to call: asking for it anew would cost more than it is
// worth. What is taken holds until the next `open`.
class Scratch {
  public:
    void open(i64 bytes) {
        if (memory_.size() < size_t(bytes) + 64) memory_ = std::vector<char>(size_t(bytes) + 64);
        used_ = size_t(-reinterpret_cast<uintptr_t>(memory_.data()) % 64);
    }
    template <class T>
    T* take(i64 n) {
        T* taken = reinterpret_cast<T*>(memory_.data() + used_);
        used_ += size_t(room<T>(n));
        return taken;
    }
    // What n elements take, in whole cache lines.
    template <class T>
    static i64 room(i64 n) {
        return (n * i64(sizeof(T)) + 63) / 64 * 64;
    }

  private:
    std::vector<char> memory_;
    size_t used_ = 0;
};

}  // namespace quintet
