// Products of many rows with a matrix. 2 LANES rows of the matrix are packed, a pair of columns after
// the other, so that lanes are outputs and a pair of a row's numbers is broadcast to all of them.
#pragma once
#include "tiles.h"

namespace {

constexpr int TILE = LANES == 16 ? 12 : 4;  // rows whose sums are in registers at once

// Rows of matrices of I columns: up to LANES from `low`, up to LANES from `high`.
struct Panel {
    const bf16 *low, *high;
    i64 lows, highs, stride;
};

// What is left of one matrix, in which `high` follows `low`, or of two.
inline Panel panel_of(const bf16* w, i64 stride, i64 rows) {
    return {w, w + LANES * stride, std::clamp<i64>(rows, 0, LANES), std::clamp<i64>(rows - LANES, 0, LANES), stride};
}
inline Panel panel_of(const bf16* gate, const bf16* up, i64 stride, i64 rows) {
    rows = std::clamp<i64>(rows, 0, LANES);
    return {gate, up, rows, rows, stride};
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

// A panel takes (I + 1) / 2 pairs of 2 LANES.
inline void pack_half(const bf16* w, i64 stride, i64 rows, i64 I, uint32_t* to) {
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
inline void pack(const Panel& p, i64 I, uint32_t* to) {
    pack_half(p.low, p.stride, p.lows, I, to);
    pack_half(p.high, p.stride, p.highs, I, to + LANES);
}

// What is fetched into the second-level cache meanwhile: of the two halves of the panel that comes
// next, `each` lines for each line of a row.
struct Ahead {
    const char *low, *high;
    i64 each;
    // To be through when `products` tiles have met a panel.
    Ahead(const Panel& next, i64 products)
        : low(reinterpret_cast<const char*>(next.low)),
          high(reinterpret_cast<const char*>(next.high)),
          each((LANES + products - 1) / products) {}
    void step() {
        for (i64 i = 0; i < each; ++i) prefetch<_MM_HINT_T1>(low, 64 * i), prefetch<_MM_HINT_T1>(high, 64 * i);
        low += 64 * each, high += 64 * each;
    }
};

// What R rows of x make of a panel, `start` added, given to finish(row, low, high).
template <int R, class Finish>
__attribute__((noinline)) void tile(const uint32_t* w, const bf16* x, i64 stride, i64 pairs,
                                    const float* start, Ahead& ahead, const Finish& finish) {
    F low[R], high[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) low[r] = load(start), high[r] = load(start + LANES);
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

// The same for any number of rows up to TILE.
template <int R = TILE, class Finish>
inline void few_rows(i64 n, const uint32_t* w, const bf16* x, i64 stride, i64 pairs,
                     const float* start, Ahead& ahead, const Finish& finish) {
    if (n == R) return tile<R>(w, x, stride, pairs, start, ahead, finish);
    if constexpr (R > 1) few_rows<R - 1>(n, w, x, stride, pairs, start, ahead, finish);
}

// Rows of x as `tile` likes them: an even number of columns, and not at distances that would put all
// of a tile into the same few places of a cache.
inline i64 spread(i64 I) { return (I + 31) / 32 * 32 + 32; }
inline void copy_row(const bf16* x, i64 I, bf16* to) {
    std::memcpy(to, x, size_t(2 * I));
    if (I % 2) to[I] = {};
}

inline void store_both(bf16* y, F low, F high, i64 columns) {
    if (columns == 2 * LANES) {
#if defined(__AVX512BF16__)
        store_pairs(y, (Pairs)_mm512_cvtne2ps_pbh(high, low));
#else
        store(y, low), store(y + LANES, high);
#endif
    } else {
        store(y, low, std::min<i64>(LANES, columns));
        if (columns > LANES) store(y + LANES, high, columns - LANES);
    }
}

}  // namespace
