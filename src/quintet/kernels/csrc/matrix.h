// Matrices as models hold them, and their product with few vectors: bound by reading the matrix.
//
// A matrix offers `rows(x, M, from, to, out)`: for each of its rows o in [from, to) and each of M
// vectors, out(m, o) is the dot product. A vector comes as the matrix's `Input`: what is made of it
// once and serves for all rows. One thread reads its rows as one line of memory: several lines at a
// time halve the bandwidth here.
#pragma once
#include <vector>

#include "span.h"

namespace quintet {

// Below this many bytes of weights, waking the other threads takes longer than it saves.
constexpr i64 SMALL = 16384;

// How many bytes a matrix takes, and its scales.
struct Bytes {
    i64 weight, scale;

    bool within(const Span<const void>& w, const Span<const void>& s) const {
        return w.as<char>().holds(weight) && s.as<char>().holds(scale);
    }
};

// Where products of M vectors and the rows [from, from + width) of a matrix go. One type for all
// callers: the compiler makes the loops of a matrix once.
struct Products {
    float* out;
    i64 width, from;
    void operator()(i64 m, i64 o, float value) const { out[m * width + o - from] = value; }
};

// Call fn<MB>() for M vectors in as few blocks of at most MOST as there can be.
template <int MOST, class Fn>
inline void in_blocks(i64 M, Fn&& fn) {
    const i64 blocks = (M + MOST - 1) / MOST, size = (M + blocks - 1) / blocks;
    for (i64 m = 0; m < M; m += size) {
        const i64 n = std::min(size, M - m);
        if (n == 1) fn(m, std::integral_constant<int, 1>());
        if constexpr (MOST >= 2)
            if (n == 2) fn(m, std::integral_constant<int, 2>());
        if constexpr (MOST >= 3)
            if (n == 3) fn(m, std::integral_constant<int, 3>());
        if constexpr (MOST >= 4)
            if (n == 4) fn(m, std::integral_constant<int, 4>());
        if constexpr (MOST >= 5)
            if (n == 5) fn(m, std::integral_constant<int, 5>());
        if constexpr (MOST >= 6)
            if (n == 6) fn(m, std::integral_constant<int, 6>());
        if constexpr (MOST >= 7)
            if (n == 7) fn(m, std::integral_constant<int, 7>());
        if constexpr (MOST >= 8)
            if (n == 8) fn(m, std::integral_constant<int, 8>());
    }
}

// The sums of `lanes(r)` for R rows.
template <int R, class Lanes>
__attribute__((always_inline)) inline void row_sums(const Lanes& lanes, float* to) {
    if constexpr (R == 4) sums(lanes(0), lanes(1), lanes(2), lanes(3), to);
    else
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) to[r] = sum(lanes(r));
}

// W (O, I) as it is.
template <class T>
struct Plain {
    using Input = const T*;
    using Stored = T;
    using Scale = float;
    const T* w;
    i64 I;
    i64 stride;

    i64 bytes() const { return I * i64(sizeof(T)); }
    static Bytes bytes(i64 O, i64 I, i64 stride) { return {reach({{O, stride}, {I, 1}}) * i64(sizeof(T)), 0}; }

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const;
};

// What of M vectors (M, I) a matrix multiplies: pointers to them, or their groups. They are there
// from the start, or room is made for them, which several threads then fill.
template <class Matrix>
struct Inputs;

template <class T>
struct Inputs<Plain<T>> {
    std::vector<const T*> of;
    Inputs(i64 M, i64) : of(size_t(M)) {}
    Inputs(const T* x, i64 M, i64 I, i64 stride) : of(size_t(M)) { fill(x, M, stride, 0, 1); (void)I; }

    void fill(const T* x, i64 M, i64 stride, i64 thread, i64) {
        if (thread == 0)
            for (i64 m = 0; m < M; ++m) of[size_t(m)] = x + m * stride;
    }
};

}  // namespace quintet
