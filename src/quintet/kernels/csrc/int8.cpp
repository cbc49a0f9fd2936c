// Products of 8-bit integers.
#include "across_bytes.h"
#include "int8.h"

using namespace quintet;

namespace {

struct Rows : Int8 {
    void run(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
#if defined(QUINTET_BYTES_ACROSS)
        if (M >= MANY && to - from >= ROWS_OF_BYTES) return bytes_across(q, scale, I, x, M, from, to, put);
#endif
        constexpr int MOST = LANES == 16 ? 4 : 2, ROWS = LANES == 16 ? 4 : 2;
        i64 o = from;
        for (; M > 1 && o + ROWS <= to; o += ROWS)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<ROWS, n()>(x, m, o, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<1, n()>(x, m, o, put); });
    }

  private:
    // From so many vectors on, it pays that they lie across the lanes.
    static constexpr i64 MANY = 9;

    // R rows by MB vectors, whose products are integers over a span. What is fetched meanwhile lies ahead
    // of a single row, or is the next R rows in the order in which memory has them.
    template <int R, int MB>
    void block(const Input* x, i64 m0, i64 o, const Products& put) const {
        const int8_t* p = q + o * I;
        const int8_t* next = p + R * I;
        // Integers have one sum whatever the order: of few, several at a time.
        constexpr int WAYS = R * MB == 1 ? 4 : R * MB <= 8 ? 2 : 1;
        float acc[MB][R] = {};
        for (i64 start = 0; start < I; start += SPAN) {
            Words all_sums[WAYS][R][MB];
            for (auto& sums : all_sums)
                for (int r = 0; r < R; ++r)
                    for (int m = 0; m < MB; ++m) sums[r][m] = no_words();
            const auto step = [&](const int8_t* from, i64 apart, i64 at, Words (&sums)[R][MB]) __attribute__((always_inline)) {
                Words w[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) w[r] = widen_signed(from + r * apart);
#pragma GCC unroll 6
                for (int m = 0; m < MB; ++m) {
                    const Words xm = words(x[m0 + m].values + at);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sums[r][m] = pair_products(sums[r][m], w[r], xm);
                }
            };
            const auto add_up = [&](int m, float by) __attribute__((always_inline)) {
                Words of_rows[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    of_rows[r] = all_sums[0][r][m];
                    for (int way = 1; way < WAYS; ++way) of_rows[r] = add_words(of_rows[r], all_sums[way][r][m]);
                    for (auto& sums : all_sums) sums[r][m] = no_words();
                }
                add_totals<R>(of_rows, by, acc[m]);
            };
            const auto end_group = [&](i64 at) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int m = 0; m < MB; ++m)
                    if (__builtin_expect(x[m0 + m].splits[start / SPAN], 0)) add_up(m, x[m0 + m].scale[at / GROUP]);
            };
            const i64 end = std::min(start + SPAN, I);
            i64 i = start;
            for (; i + GROUP <= end; i += GROUP) {
                if (R == 1) prefetch<_MM_HINT_T1>(p + i, AHEAD);
                else if (m0 == 0)
                    for (int r = 0; r < R; ++r) prefetch<_MM_HINT_T1>(next + i * R + r * GROUP, 0);
#pragma GCC unroll 4
                for (int h = 0; h < 2 * HALVES; ++h) step(p + i + h * WORDS, I, i + h * WORDS, all_sums[h % WAYS]);
                end_group(i);
            }
            if (i < end) {
                alignas(64) int8_t rest[R][GROUP] = {};
                for (int r = 0; r < R; ++r) std::memcpy(rest[r], p + r * I + i, size_t(end - i));
                for (int h = 0; h < 2 * HALVES; ++h) step(rest[0] + h * WORDS, GROUP, i + h * WORDS, all_sums[h % WAYS]);
                end_group(i);
            }
#pragma GCC unroll 4
            for (int m = 0; m < MB; ++m)
                if (!x[m0 + m].splits[start / SPAN]) add_up(m, x[m0 + m].scale[start / GROUP]);
        }
        for (int m = 0; m < MB; ++m)
            for (int r = 0; r < R; ++r) put(m0 + m, o + r, acc[m][r] * scale[o + r]);
    }
};

}  // namespace

void Int8::rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
    Rows{*this}.run(x, M, from, to, put);
}
