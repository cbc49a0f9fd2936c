// Matrices as models hold them, and their product with few vectors: bound by reading the matrix.
//
// A matrix offers `rows(x, M, from, to, out)`: for each of its rows o in [from, to) and each of M
// vectors, out(m, o) is the dot product. A vector comes as the matrix's `Input`: what is made of it
// once and serves for all rows. One thread reads its rows as one line of memory: several lines at a
// time halve the bandwidth here.
#pragma once
#include "product.h"
#include "span.h"

namespace {

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

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        if constexpr (std::is_same_v<T, bf16>)
            if (M >= PACKED) return packed(x, M, from, to, put);
        constexpr int MOST = LANES == 16 ? 6 : 2;
        i64 o = from;
        for (; M > 1 && o + 4 <= to; o += 4)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<4, n()>(x, m, o, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<1, n()>(x, m, o, put); });
    }

  private:
    // From so many vectors on, packing rows for them pays.
        static constexpr i64 PACKED = 10;

    // R rows by MB vectors. While the first block of vectors computes, the next R rows are on their
    // way, in the order in which memory has them; of a single row the processor sees best what comes next.
    template <int R, int MB>
    void block(const Input* x, i64 m0, i64 o, const Products& put) const {
        using C = Chunk<T>;
        constexpr i64 N = C::SIZE;
        const T* p = w + o * stride;
        const T* next = p + R * stride;
        F acc[R][MB];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < MB; ++m) acc[r][m] = zero();
        i64 i = 0;
        for (; i + N <= I; i += N) {
            typename C::V wv[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (R * MB > 1 && m0 == 0) prefetch<_MM_HINT_T1>(next + i * R + r * N, 0);
                wv[r] = C::at(p + r * stride + i);
            }
#pragma GCC unroll 6
            for (int m = 0; m < MB; ++m) {
                const typename C::V xv = C::at(x[m0 + m] + i);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) acc[r][m] = C::dot_to(acc[r][m], wv[r], xv);
            }
        }
        if (i < I)
            for (int m = 0; m < MB; ++m)
                for (int r = 0; r < R; ++r)
                    acc[r][m] = C::dot_to(acc[r][m], C::at(p + r * stride + i, I - i),
                                          C::at(x[m0 + m] + i, I - i));
        for (int m = 0; m < MB; ++m) {
            float made[R];
            const auto lanes = [&](int r) { return acc[r][m]; };
            row_sums<R>(lanes, made);
            for (int r = 0; r < R; ++r) put(m0 + m, o + r, made[r]);
        }
    }

    // The same sums by panels of rows, each read once for all vectors.
    void packed(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        static thread_local Scratch scratch;
        const i64 row = row_size(I), tiles = (M + TILE - 1) / TILE;
        scratch.open(Scratch::room<uint32_t>(M * row) + Scratch::room<uint32_t>(panel_size(I)));
        uint32_t *arranged = scratch.take<uint32_t>(M * row), *panel = scratch.take<uint32_t>(panel_size(I));
        for (i64 m = 0; m < M; ++m) arrange(x[m], I, arranged + m * row);
        const auto panel_at = [&](i64 o) { return panel_of(w + o * stride, stride, to - o); };
        for (i64 o = from; o < to; o += 2 * LANES) {
            const i64 columns = std::min<i64>(2 * LANES, to - o);
            pack(panel_at(o), I, panel);
            Ahead ahead(panel_at(std::min(o + 2 * LANES, to - 1)), tiles);
            for (i64 t = 0; t < tiles; ++t) {
                const i64 m = M * t / tiles, size = M * (t + 1) / tiles - m;
                float* out = put.out + m * put.width + o - put.from;
                few_rows(size, panel, arranged + m * row, I, ahead, [&](int r, F low, F high) __attribute__((always_inline)) {
                    float* y = out + r * put.width;
                    if (columns == 2 * LANES) return store(y, low), store(y + LANES, high);
                    store(y, low, std::min<i64>(LANES, columns));
                    if (columns > LANES) store(y + LANES, high, columns - LANES);
                });
            }
        }
    }
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

}  // namespace
