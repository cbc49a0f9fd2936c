// What is done with a row between the products: normalise, rotate.
#pragma once
#include "simd.h"

namespace quintet {

template <class T, class Fn>
inline void each_vector(i64 n, Fn&& fn) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) fn(i, std::false_type());
    if (i < n) fn(i, std::true_type());
}
template <class T>
inline F get(const T* p, i64 i, i64 n, std::false_type) { return (void)n, load(p + i); }
template <class T>
inline F get(const T* p, i64 i, i64 n, std::true_type) { return load(p + i, n - i); }
template <class T>
inline void set(T* p, i64 i, i64 n, F x, std::false_type) { (void)n, store(p + i, x); }
template <class T>
inline void set(T* p, i64 i, i64 n, F x, std::true_type) { store(p + i, x, n - i); }

inline F round_to(F x, const float*) { return x; }
inline F round_to(F x, const bf16*) {
    bf16 halves[LANES];
    store(halves, x);
    return load(halves);
}

// x / sqrt(mean(x²) + eps), rounded, times the weight.
template <class T>
void normalise(const T* x, const T* weight, T* y, i64 C, float eps) {
    F squares = zero();
    each_vector<T>(C, [&](i64 i, auto last) {
        const F v = get(x, i, C, last);
        squares = fma(v, v, squares);
    });
    const F by = all(1.0f / std::sqrt(sum(squares) / float(C) + eps));
    each_vector<T>(C, [&](i64 i, auto last) {
        const F unit = round_to(mul(get(x, i, C, last), by), x);
        set(y, i, C, mul(unit, get(weight, i, C, last)), last);
    });
}

// The pairs (i, i + D/2) by the angles of cos and sin (D).
template <class T>
void rotate_head(const T* x, T* y, const T* cos, const T* sin, i64 D) {
    const i64 half = D / 2;
    each_vector<T>(half, [&](i64 i, auto last) {
        const F left = get(x, i, half, last), right = get(x + half, i, half, last);
        const F cl = get(cos, i, half, last), sl = get(sin, i, half, last);
        const F cr = get(cos + half, i, half, last), sr = get(sin + half, i, half, last);
        set(y, i, half, sub(mul(left, cl), mul(right, sl)), last);
        set(y + half, i, half, fma(left, sr, mul(right, cr)), last);
    });
}

// The pairs (2i, 2i + 1), which part to i and i + D/2.
template <class T>
void rotate_neighbours(const T* x, T* y, const T* cos, const T* sin, i64 D) {
    for (i64 i = 0; i < D / 2; ++i) {
        const float left = widen(x[2 * i]), right = widen(x[2 * i + 1]);
        const float c = widen(cos[i]), s = widen(sin[i]);
        narrow(left * c - right * s, y + i);
        narrow(right * c + left * s, y + D / 2 + i);
    }
}

}  // namespace quintet
