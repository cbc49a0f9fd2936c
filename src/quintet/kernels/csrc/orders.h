// In which order the products of many rows with a matrix are summed: as those of a few rows are, which
// gives a row the same bits in any company, or along all pairs of columns, which takes a fifteenth less
// of a prompt with narrow matrices and gives the same bits to a row beside any number of others.
#pragma once
#include "product.h"

namespace quintet {

// As `tile` sums, whose rows of x are arranged.
struct ByLanes {
    using Number = uint32_t;
    static i64 row(i64 I) { return row_size(I); }
    static i64 panel(i64 I) { return panel_size(I); }
    static bool as_it_lies(i64, i64) { return false; }
    static void take(const bf16* x, i64 I, uint32_t* to) { arrange(x, I, to); }
    static void fill(const Panel& p, i64 I, uint32_t* to) { pack(p, I, to); }
    template <class Finish>
    static void run(i64 n, const uint32_t* w, const uint32_t* x, i64, i64 I, Ahead& ahead, const Finish& finish) {
        few_rows(n, w, x, I, ahead, finish);
    }
};

// A panel takes (I + 1) / 2 pairs of 2 LANES.
inline void pack_half_along(const bf16* w, i64 stride, i64 rows, i64 I, uint32_t* to) {
    for (i64 i = 0; i < I; i += 2 * LANES) {
        const i64 n = std::min<i64>(2 * LANES, I - i);
        Pairs some[LANES];
        for (i64 k = 0; k < LANES; ++k) {
            const bf16* from = w + k * stride + i;
            some[k] = k >= rows ? Pairs{} : n == 2 * LANES ? load_pairs(from) : load_pairs(from, n);
        }
        transpose(some);
        for (i64 k = 0; k < (n + 1) / 2; ++k, to += 2 * LANES) store_pairs(to, some[k]);
    }
}
inline void pack_along(const Panel& p, i64 I, uint32_t* to) {
    pack_half_along(p.low, p.stride, p.lows, I, to);
    pack_half_along(p.high, p.stride, p.highs, I, to + LANES);
}

// What R rows of x make of a panel, given to finish(row, low, high).
template <int R, class Finish>
__attribute__((noinline)) void tile_along(const uint32_t* w, const bf16* x, i64 stride, i64 pairs, Ahead& ahead,
                                          const Finish& finish) {
    F low[R], high[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) low[r] = high[r] = zero();
    const i64 row = 2 * stride;
    // Three rows to an address: more would not fit the registers for them.
    const char* at[4];
    for (int i = 0; i < 4; ++i) at[i] = reinterpret_cast<const char*>(x) + 3 * i * row;
    const auto step = [&](int k) __attribute__((always_inline)) {
        const Pairs a = load_lanes(w + 2 * k * LANES), b = load_lanes(w + (2 * k + 1) * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const Pairs pair = same_pair(at[r / 3] + r % 3 * row + 4 * k);
            low[r] = dot(low[r], a, pair);
            high[r] = dot(high[r], b, pair);
        }
    };
    i64 k = 0;
    for (; k + 16 <= pairs; k += 16) {
        ahead.step();
        for (int part = 0; part < 4; ++part) {
            step(0), step(1), step(2), step(3);
            w += 8 * LANES;
            for (auto& p : at) p += 16;
        }
    }
    for (; k < pairs; ++k) {
        step(0);
        w += 2 * LANES;
        for (auto& p : at) p += 4;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) finish(r, low[r], high[r]);
}

// One sum an output, along a row.
struct Along {
    using Number = bf16;
    // An even number of columns, and not at distances that would put all rows of a tile into the same
    // few places of a cache.
    static i64 row(i64 I) { return (I + 31) / 32 * 32 + 32; }
    static i64 panel(i64 I) { return (I + 1) / 2 * 2 * LANES; }
    static bool as_it_lies(i64 I, i64 stride) { return I % 2 == 0 && 2 * stride % 2048 != 0; }
    static void take(const bf16* x, i64 I, bf16* to) {
        std::memcpy(to, x, size_t(2 * I));
        if (I % 2) to[I] = {};
    }
    static void fill(const Panel& p, i64 I, uint32_t* to) { pack_along(p, I, to); }
    template <int R = TILE, class Finish>
    static void run(i64 n, const uint32_t* w, const bf16* x, i64 stride, i64 I, Ahead& ahead, const Finish& finish) {
        if (n == R) return tile_along<R>(w, x, stride, (I + 1) / 2, ahead, finish);
        if constexpr (R > 1) run<R - 1>(n, w, x, stride, I, ahead, finish);
    }
};

}  // namespace quintet
