// Products of a matrix with many vectors at once, which lie across the lanes: a pair of a row's numbers is
// broadcast and meets a pair of each vector. Rows are read as they lie in memory, once, and what has to be
// arranged is small.
//
// Sums are those of `sum`: the pairs that a lane along the row would meet follow each other, lane after
// lane, and lanes are added in its order.
#pragma once
#include "matrix.h"
#include "tiles.h"

namespace quintet {

constexpr i64 ROWS_ACROSS = LANES == 16 ? 6 : 4;  // rows whose sums are in registers at once

// Lanes along a row that are summed side by side, for G times LANES vectors.
template <int G>
constexpr int ABREAST = (LANES == 16 ? 4 : 2) / G;

// How many pairs LANES vectors of I numbers take.
inline i64 across_size(i64 I) { return steps(I) * LANES * LANES; }

// Up to G · LANES vectors, in the order in which `meet` takes them; G · across_size(I) pairs.
template <int G>
void lay_across(const bf16* const* x, i64 n, i64 I, uint32_t* to) {
    const i64 count = steps(I);
    for (i64 s = 0; s < count; ++s) {
        const i64 left = I - s * 2 * LANES;
        for (int g = 0; g < G; ++g) {
            Pairs some[LANES];
            for (i64 m = 0; m < LANES; ++m) {
                if (g * LANES + m >= n) some[m] = Pairs{};
                else if (left >= 2 * LANES) some[m] = load_pairs(x[g * LANES + m] + s * 2 * LANES);
                else some[m] = load_pairs(x[g * LANES + m] + s * 2 * LANES, left);
            }
            transpose(some);
            for (int k = 0; k < LANES; ++k)
                store_pairs(to + (((k / ABREAST<G> * count + s) * ABREAST<G> + k % ABREAST<G>) * G + g) * LANES, some[ORDER[k]]);
        }
    }
}

// The memory that is asked for meanwhile, line by line.
struct Next {
    const char* p;
    i64 bytes;

    void lines(int n) {
        if (bytes <= 0) return;
        for (int i = 0; i < n; ++i) prefetch<_MM_HINT_T1>(p, 64 * i);
        p += 64 * n, bytes -= 64 * n;
    }
};

// The products of R rows and G · LANES vectors that lie across: out (R, G · LANES).
template <int G, int R>
__attribute__((noinline)) void meet(const bf16* w, i64 stride, const uint32_t* x, i64 I, Next& next, float* out) {
    constexpr int L = ABREAST<G>, PASSES = LANES / L, LEVELS = PASSES == 8 ? 3 : 2;
    static_assert(PASSES == 8 || PASSES == 4);
    const i64 whole = I / (2 * LANES), row = 2 * stride;
    // What is left of a row, behind which another one lies or nothing.
    alignas(64) bf16 rest[R][2 * LANES] = {};
    const i64 left = I - whole * 2 * LANES;
    if (left)
        for (int r = 0; r < R; ++r) std::memcpy(rest[r], w + r * stride + whole * 2 * LANES, size_t(2 * left));
    F kept[LEVELS][R][G];
    for (int pass = 0; pass < PASSES; ++pass) {
        F acc[R * L * G];
#pragma GCC unroll 24
        for (F& sum : acc) sum = zero();
        const char* at[L];
        const auto step = [&](int k, i64 apart) __attribute__((always_inline)) {
            Pairs vectors[L * G];
#pragma GCC unroll 4
            for (int i = 0; i < L * G; ++i) vectors[i] = load_lanes(x + (k * L * G + i) * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int l = 0; l < L; ++l) {
                    const Pairs pair = same_pair(at[l] + r * apart + 4 * LANES * k);
#pragma GCC unroll 2
                    for (int g = 0; g < G; ++g) acc[(r * L + l) * G + g] = dot(acc[(r * L + l) * G + g], vectors[l * G + g], pair);
                }
        };
        const auto go_on = [&](int steps) __attribute__((always_inline)) {
            x += steps * L * G * LANES;
            for (auto& p : at) p += 4 * LANES * steps;
        };
        for (int l = 0; l < L; ++l) at[l] = reinterpret_cast<const char*>(w) + 4 * ORDER[pass * L + l];
        i64 s = 0;
        for (; s + 4 <= whole; s += 4, go_on(4)) {
            next.lines(L < 4 ? 4 : 8);
            step(0, row), step(1, row), step(2, row), step(3, row);
            // The registers are for the sums.
#pragma GCC unroll 24
            for (F& sum : acc) asm volatile("" : "+v"(sum));
        }
        for (; s < whole; ++s, go_on(1)) step(0, row);
        if (left) {
            for (int l = 0; l < L; ++l) at[l] = reinterpret_cast<const char*>(rest) + 4 * ORDER[pass * L + l];
            step(0, sizeof(rest[0]));
            go_on(1);
        }
        // As one counts: what two, four, ... lanes made waits for the next two, four, ...
        F sums[R][G];
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < G; ++g) {
                const F* lanes = acc + r * L * G + g;
                if constexpr (L == 4) sums[r][g] = add(add(lanes[0], lanes[G]), add(lanes[2 * G], lanes[3 * G]));
                else if constexpr (L == 2) sums[r][g] = add(lanes[0], lanes[G]);
                else sums[r][g] = lanes[0];
            }
        int level = 0;
        for (int bits = pass; bits & 1; bits >>= 1, ++level)
            for (int r = 0; r < R; ++r)
                for (int g = 0; g < G; ++g) sums[r][g] = add(kept[level][r][g], sums[r][g]);
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < G; ++g) {
                if (level < LEVELS) kept[level][r][g] = sums[r][g];
                else store(out + (r * G + g) * LANES, sums[r][g]);
            }
    }
}

// Call fn(m, n, G) for M vectors: n of them from m on, in G times LANES lanes.
template <class Fn>
inline void in_groups(i64 M, Fn&& fn) {
    for (i64 m = 0; m < M; m += 2 * LANES) {
        const i64 n = std::min<i64>(2 * LANES, M - m);
        if (n > LANES) fn(m, n, std::integral_constant<int, 2>());
        else fn(m, n, std::integral_constant<int, 1>());
    }
}

// What R rows o and n vectors made, (R, room), to where it goes.
template <int R>
inline void put_across(const float* made, i64 room, i64 n, const Products& put, i64 m, i64 o) {
    for (i64 from = 0; from < n; from += LANES) {
        Pairs some[LANES] = {};
        for (int r = 0; r < R; ++r) std::memcpy(&some[r], made + r * room + from, sizeof(some[r]));
        transpose(some);
        for (i64 i = 0; i < std::min<i64>(LANES, n - from); ++i) {
            F of_vector;
            std::memcpy(&of_vector, &some[i], sizeof(of_vector));
            store(put.out + (m + from + i) * put.width + o - put.from, of_vector, R);
        }
    }
}

}  // namespace quintet
