// A plain matrix and what of it one thread computes.
#pragma once
#include "simd.h"

namespace {

// Below this many bytes of weights, waking the other threads takes longer than it saves.
constexpr i64 SMALL = 16384;

// One map of an input: W (O, I), b (O) or null, y (M, O). Eight-byte fields, as Python fills them.
template <class T>
struct Dense {
    const T* w;
    const T* b;
    T* y;
    i64 O;
    i64 w_stride;
    i64 y_stride;

    void rows(const T* x, i64 M, i64 I, i64 x_stride, i64 from, i64 to) const {
        if (M == 1) return stream(x, I, from, to);
        i64 o = from;
        for (; o + 4 <= to; o += 4) group<4>(x, M, I, x_stride, o);
        for (; o < to; ++o) group<1>(x, M, I, x_stride, o);
    }

  private:
    void put(i64 m, i64 o, float value) const {
        narrow(b ? value + widen(b[o]) : value, y + m * y_stride + o);
    }

    // One row after the other, so that memory is read in one line, 8 KB ahead.
    void stream(const T* x, i64 I, i64 from, i64 to) const {
        using C = Chunk<T>;
        constexpr i64 N = C::SIZE;
        for (i64 o = from; o < to; ++o) {
            const T* p = w + o * w_stride;
            F even = zero(), odd = zero();
            i64 i = 0;
            for (; i + 2 * N <= I; i += 2 * N) {
                prefetch<_MM_HINT_T0>(p + i, 8192);
                if (LANES == 16) prefetch<_MM_HINT_T0>(p + i, 8192 + 64);
                even = C::dot_to(even, C::at(p + i), C::at(x + i));
                odd = C::dot_to(odd, C::at(p + i + N), C::at(x + i + N));
            }
            if (i + N <= I) {
                even = C::dot_to(even, C::at(p + i), C::at(x + i));
                i += N;
            }
            if (i < I) odd = C::dot_to(odd, C::at(p + i, I - i), C::at(x + i, I - i));
            put(0, o, sum(add(even, odd)));
        }
    }

    // R rows by all M vectors, in blocks of the vectors that registers can hold. While the first
    // block computes, the next R rows are on their way, in the order in which memory has them.
    template <int R>
    void group(const T* x, i64 M, i64 I, i64 x_stride, i64 o) const {
        constexpr i64 MOST = LANES == 16 ? 6 : 2;
        const i64 blocks = (M + MOST - 1) / MOST, size = (M + blocks - 1) / blocks;
        for (i64 m = 0; m < M; m += size) {
            const T* from = x + m * x_stride;
            switch (std::min(size, M - m)) {
                case 1: block<R, 1>(from, I, x_stride, o, m); break;
                case 2: block<R, 2>(from, I, x_stride, o, m); break;
                case 3: block<R, 3>(from, I, x_stride, o, m); break;
                case 4: block<R, 4>(from, I, x_stride, o, m); break;
                case 5: block<R, 5>(from, I, x_stride, o, m); break;
                case 6: block<R, 6>(from, I, x_stride, o, m); break;
            }
        }
    }

    template <int R, int MB>
    void block(const T* x, i64 I, i64 x_stride, i64 o, i64 m0) const {
        using C = Chunk<T>;
        constexpr i64 N = C::SIZE;
        const T* p = w + o * w_stride;
        const T* ahead = p + R * w_stride;
        F acc[R][MB];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < MB; ++m) acc[r][m] = zero();
        i64 i = 0;
        for (; i + N <= I; i += N) {
            typename C::V wv[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                if (m0 == 0) prefetch<_MM_HINT_T1>(ahead + i * R + r * N, 0);
                wv[r] = C::at(p + r * w_stride + i);
            }
#pragma GCC unroll 8
            for (int m = 0; m < MB; ++m) {
                const typename C::V xv = C::at(x + m * x_stride + i);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][m] = C::dot_to(acc[r][m], wv[r], xv);
            }
        }
        if (i < I)
            for (int m = 0; m < MB; ++m)
                for (int r = 0; r < R; ++r)
                    acc[r][m] = C::dot_to(acc[r][m], C::at(p + r * w_stride + i, I - i),
                                          C::at(x + m * x_stride + i, I - i));
        for (int m = 0; m < MB; ++m)
            for (int r = 0; r < R; ++r) put(m0 + m, o + r, sum(acc[r][m]));
    }
};

}  // namespace
