// Products of the many rows of a prompt with a matrix. 2 LANES rows of the matrix are packed, so that lanes are
// outputs and a pair of a row's numbers is broadcast to all of them.
//
// A dot product is summed as `sum` sums the lanes of a vector that went along both rows: pairs that
// such a lane meets follow each other, lane after lane, and lanes are added as `sum` does. So a result
// has the same bits whichever way it was computed, and beside however many others. Prompts have an
// order of their own (orders.h).
#pragma once
#include "tiles.h"

namespace quintet {

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

// From a lane's pairs to the next one's, in a panel and in a row of x: at distances that do not put
// many into the same few places of a cache.
inline i64 apart(i64 I) { return steps(I) * 2 * LANES + LANES; }
inline i64 panel_size(i64 I) { return LANES * apart(I); }
inline i64 row_size(i64 I) { return steps(I) * LANES + LANES; }

inline void pack_half(const bf16* w, i64 stride, i64 rows, i64 I, uint32_t* to) {
    for (i64 i = 0; i < I; i += 2 * LANES, to += 2 * LANES) {
        const i64 n = std::min<i64>(2 * LANES, I - i);
        Pairs some[LANES];
        for (i64 k = 0; k < LANES; ++k) {
            const bf16* from = w + k * stride + i;
            some[k] = k >= rows ? Pairs{} : n == 2 * LANES ? load_pairs(from) : load_pairs(from, n);
        }
        transpose(some);
        for (i64 k = 0; k < LANES; ++k) store_pairs(to + k * apart(I), some[ORDER[k]]);
    }
}
inline void pack(const Panel& p, i64 I, uint32_t* to) {
    pack_half(p.low, p.stride, p.lows, I, to);
    pack_half(p.high, p.stride, p.highs, I, to + LANES);
}

// A row of x in that order.
inline void arrange(const bf16* x, i64 I, uint32_t* to) {
    for (i64 step = 0; step < steps(I); step += LANES, x += 2 * LANES * LANES) {
        const i64 some_steps = std::min<i64>(LANES, steps(I) - step), left = I - step * 2 * LANES;
        Pairs some[LANES];
        for (i64 k = 0; k < LANES; ++k) {
            const i64 n = left - k * 2 * LANES;
            some[k] = n >= 2 * LANES ? load_pairs(x + k * 2 * LANES) : n > 0 ? load_pairs(x + k * 2 * LANES, n) : Pairs{};
        }
        transpose(some);
        for (i64 k = 0; k < LANES; ++k)
            std::memcpy(to + k * steps(I) + step, &some[ORDER[k]], size_t(4 * some_steps));
    }
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

// What R arranged rows of x make of a panel, given to finish(row, low, high).
template <int R, class Finish>
__attribute__((noinline)) void tile(const uint32_t* w, const uint32_t* x, i64 I, Ahead& ahead, const Finish& finish) {
    constexpr int LEVELS = LANES == 16 ? 4 : 3;
    F low[R], high[R], kept[LEVELS][2][R];
    const i64 row = 4 * row_size(I), count = steps(I);
    i64 met = 0;
#pragma GCC unroll 1
    for (int lane = 0; lane < LANES; ++lane, w += LANES) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) low[r] = high[r] = zero();
        // Three rows to an address: more would not fit the registers for them.
        const char* at[4];
        for (int i = 0; i < 4; ++i) at[i] = reinterpret_cast<const char*>(x + lane * count) + 3 * i * row;
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
        for (; k + 4 <= count; k += 4) {
            if (met++ % 4 == 0) ahead.step();
            step(0), step(1), step(2), step(3);
            w += 8 * LANES;
            for (auto& p : at) p += 16;
        }
        for (; k < count; ++k) {
            step(0);
            w += 2 * LANES;
            for (auto& p : at) p += 4;
        }
        // As one counts: what two, four, ... lanes made waits for the next two, four, ...
        int level = 0;
        for (int bits = lane; bits & 1; bits >>= 1, ++level)
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                low[r] = add(kept[level][0][r], low[r]);
                high[r] = add(kept[level][1][r], high[r]);
            }
        if (level < LEVELS)
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) kept[level][0][r] = low[r], kept[level][1][r] = high[r];
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) finish(r, low[r], high[r]);
}

// The same for any number of rows up to TILE.
template <int R = TILE, class Finish>
inline void few_rows(i64 n, const uint32_t* w, const uint32_t* x, i64 I, Ahead& ahead, const Finish& finish) {
    if (n == R) return tile<R>(w, x, I, ahead, finish);
    if constexpr (R > 1) few_rows<R - 1>(n, w, x, I, ahead, finish);
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

}  // namespace quintet
