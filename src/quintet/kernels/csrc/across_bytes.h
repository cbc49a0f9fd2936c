// Products of many vectors with 8-bit weights, by instructions that multiply four bytes by four bytes.
//
// Vectors lie across the lanes, as in across.h. A 16-bit number is x = 256 · high + low - 32768, bytes without
// a sign both, as these instructions want one of the two to be:
//
//     Σ w x = 256 · Σ w high + Σ w low - 32768 · Σ w
//
// All of it in 32 bits, in which what overflows on the way is right in the end.
#pragma once
#include "across.h"
#include "integers.h"

#if defined(__AVX512VNNI__)
#define QUINTET_BYTES_ACROSS

namespace quintet {

constexpr i64 ROWS_OF_BYTES = 12;  // rows that are done before those behind them

// G · 16 vectors across the lanes.
template <int G>
struct BytesAcross {
    static constexpr i64 GROUPS = SPAN / GROUP;

    // What a span's integers are worth, for each group of it; the first serves all where a lane does not split.
    struct Worth {
        F scale[GROUPS];
        __mmask16 splits;
    };

    Words* bytes;  // of every four columns: [group of 16 vectors][high, low]
    Worth* worth;  // (spans, G)

    static i64 columns(i64 I) { return (I + GROUP - 1) / GROUP * GROUP; }
    static i64 spans(i64 I) { return (I + SPAN - 1) / SPAN; }
    static i64 room(i64 I) {
        return Scratch::room<Words>(columns(I) / 4 * G * 2) + Scratch::room<Worth>(spans(I) * G);
    }

    BytesAcross(Scratch& scratch, const Rounded* x, i64 n, i64 I)
        : bytes(scratch.take<Words>(columns(I) / 4 * G * 2)), worth(scratch.take<Worth>(spans(I) * G)) {
        for (i64 i = 0; i < columns(I); i += 2 * LANES)
            for (int g = 0; g < G; ++g) lay(x + g * LANES, n - g * LANES, i, g);
        for (i64 span = 0; span < spans(I); ++span)
            for (int g = 0; g < G; ++g) weigh(x + g * LANES, n - g * LANES, span, I, worth[span * G + g]);
    }

  private:
    // 32 columns.
    void lay(const Rounded* x, i64 n, i64 i, int g) {
        Words some[LANES];
        for (i64 m = 0; m < LANES; ++m) {
            const Words values = _mm512_xor_si512(m < n ? words(x[m].values + i) : no_words(), _mm512_set1_epi16(short(0x8000)));
            const Words high = _mm512_srli_epi16(values, 8);
            some[m] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(high)), _mm512_cvtepi16_epi8(values), 1);
        }
        transpose(some);
        for (i64 k = 0; k < LANES; ++k) bytes[((i / 4 + k % 8) * G + g) * 2 + k / 8] = some[k];
    }

    static void weigh(const Rounded* x, i64 n, i64 span, i64 I, Worth& to) {
        to.splits = 0;
        for (i64 j = 0; j < GROUPS; ++j) {
            const i64 group = span * GROUPS + j;
            alignas(64) float scale[LANES] = {};
            for (i64 m = 0; m < std::min<i64>(n, LANES) && group * GROUP < I; ++m) {
                scale[m] = x[m].scale[group];
                to.splits = __mmask16(to.splits | (x[m].splits[span] ? 1u << m : 0u));
            }
            to.scale[j] = load(scale);
        }
    }
};

// Σ w high and Σ w low over the columns of `blocks` times 16 bytes of each of R rows.
template <int G, int R>
__attribute__((noinline)) void multiply_bytes(const int8_t* w, i64 apart, i64 blocks, const Words* x, Next& next, Words (&to)[R][G][2]) {
    Words high[R * G], low[R * G];
#pragma GCC unroll 12
    for (int i = 0; i < R * G; ++i) high[i] = low[i] = no_words();
    // Three rows to an address: more would not fit the registers for them.
    const int8_t* at[R / 3];
    for (int i = 0; i < R / 3; ++i) at[i] = w + 3 * i * apart;
    const auto step = [&](int k) __attribute__((always_inline)) {
        const Words* of_x = x + 2 * G * k;
        Words highs[G], lows[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) highs[g] = of_x[2 * g], lows[g] = of_x[2 * g + 1];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const Words four = same_pair(at[r / 3] + r % 3 * apart + 4 * k);
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) {
                high[r * G + g] = _mm512_dpbusd_epi32(high[r * G + g], highs[g], four);
                low[r * G + g] = _mm512_dpbusd_epi32(low[r * G + g], lows[g], four);
            }
        }
    };
    for (; blocks > 0; --blocks) {
        next.lines(R / 4 + 1);
        step(0), step(1), step(2), step(3);
        x += 8 * G;
        for (auto& p : at) p += 16;
        // The registers are for the sums.
#pragma GCC unroll 12
        for (int i = 0; i < R * G; ++i) asm volatile("" : "+v"(high[i]), "+v"(low[i]));
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) to[r][g][0] = high[r * G + g], to[r][g][1] = low[r * G + g];
}

// 32768 · Σ w over as many times 64 columns of each of R rows, a multiple of two.
template <int R>
inline void excess_of(const int8_t* w, i64 apart, i64 groups, int32_t* to) {
    for (int r = 0; r < R; r += 2) {
        Words sums[2] = {no_words(), no_words()};
        for (i64 g = 0; g < groups; ++g)
            for (int k = 0; k < 2; ++k)
                sums[k] = _mm512_dpbusd_epi32(sums[k], _mm512_set1_epi8(1), _mm512_loadu_si512(w + (r + k) * apart + g * GROUP));
        alignas(16) int32_t four[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(four), totals(sums[0], sums[1], sums[0], sums[1]));
        for (int k = 0; k < 2; ++k) to[r + k] = int32_t(uint32_t(four[k]) << 15);
    }
}

inline Words together(const Words (&sums)[2], int32_t excess) {
    return _mm512_sub_epi32(add_words(_mm512_slli_epi32(sums[0], 8), sums[1]), _mm512_set1_epi32(excess));
}

// The products of R rows with G · 16 vectors, times the rows' scales: out (R, G · 16).
template <int G, int R>
void meet_bytes(const int8_t* w, const float* scale, i64 I, const BytesAcross<G>& x, Next& next, float* out) {
    constexpr i64 GROUPS = SPAN / GROUP;
    Words sums[R][G][2];
    int32_t excess[R];
    F acc[R][G];
    for (auto& of_row : acc)
        for (F& sum : of_row) sum = zero();
    for (i64 start = 0; start < I; start += SPAN) {
        const auto* worth = x.worth + start / SPAN * G;
        const Words* bytes = x.bytes + start / 4 * G * 2;
        bool splits = false;
        for (int g = 0; g < G; ++g) splits |= worth[g].splits != 0;
        if (__builtin_expect(!splits && start + SPAN <= I, 1)) {
            excess_of<R>(w + start, I, GROUPS, excess);
            multiply_bytes<G, R>(w + start, I, SPAN / 16, bytes, next, sums);
            for (int r = 0; r < R; ++r)
                for (int g = 0; g < G; ++g)
                    acc[r][g] = fma(to_float(together(sums[r][g], excess[r])), worth[g].scale[0], acc[r][g]);
            continue;
        }
        Words whole[R][G];
        for (auto& of_row : whole)
            for (Words& sum : of_row) sum = no_words();
        for (i64 j = 0; j < GROUPS && start + j * GROUP < I; ++j, bytes += GROUP / 4 * G * 2) {
            const i64 i = start + j * GROUP;
            const int8_t* p = w + i;
            i64 apart = I;
            // What is left of a row, behind which another one lies or nothing.
            alignas(64) int8_t rest[R][GROUP] = {};
            if (i + GROUP > I) {
                for (int r = 0; r < R; ++r) std::memcpy(rest[r], w + r * I + i, size_t(I - i));
                p = rest[0], apart = GROUP;
            }
            excess_of<R>(p, apart, 1, excess);
            multiply_bytes<G, R>(p, apart, GROUP / 16, bytes, next, sums);
            for (int r = 0; r < R; ++r)
                for (int g = 0; g < G; ++g) {
                    const Words made = together(sums[r][g], excess[r]);
                    acc[r][g] = _mm512_mask3_fmadd_ps(to_float(made), worth[g].scale[j], acc[r][g], worth[g].splits);
                    whole[r][g] = add_words(whole[r][g], made);
                }
        }
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < G; ++g)
                acc[r][g] = _mm512_mask3_fmadd_ps(to_float(whole[r][g]), worth[g].scale[0], acc[r][g], __mmask16(~worth[g].splits));
    }
    for (int r = 0; r < R; ++r)
        for (int g = 0; g < G; ++g) store(out + (r * G + g) * LANES, mul(acc[r][g], all(scale[r])));
}

// Rows [from, to) of q (O, I) with a scale each, of which there are at least ROWS_OF_BYTES. The last block
// may repeat some of the one before.
inline void bytes_across(const int8_t* q, const float* scale, i64 I, const Rounded* x, i64 M, i64 from, i64 to, const Products& put) {
    static thread_local Scratch scratch;
    i64 room = 0;
    in_groups(M, [&](i64, i64, auto G) { room += BytesAcross<G()>::room(I); });
    scratch.open(room);
    std::vector<BytesAcross<1>> one;
    std::vector<BytesAcross<2>> two;
    in_groups(M, [&](i64 m, i64 n, auto G) {
        if constexpr (G() == 1) one.emplace_back(scratch, x + m, n, I);
        else two.emplace_back(scratch, x + m, n, I);
    });
    for (i64 o = from; o < to; o += ROWS_OF_BYTES) {
        o = std::min(o, to - ROWS_OF_BYTES);
        const bool more = o + 2 * ROWS_OF_BYTES <= to;
        Next next{reinterpret_cast<const char*>(q + (o + ROWS_OF_BYTES) * I), more ? ROWS_OF_BYTES * I : 0};
        in_groups(M, [&](i64 m, i64 n, auto G) {
            constexpr i64 R = ROWS_OF_BYTES / G();
            for (i64 at = o; at < o + ROWS_OF_BYTES; at += R) {
                alignas(64) float made[R * G() * LANES];
                if constexpr (G() == 1) meet_bytes<1, R>(q + at * I, scale + at, I, one[0], next, made);
                else meet_bytes<2, R>(q + at * I, scale + at, I, two[size_t(m / (2 * LANES))], next, made);
                put_across<R>(made, G() * LANES, n, put, m, at);
            }
        });
    }
}

}  // namespace quintet
#endif
