// Products of 4-bit integers in groups of 64.
#include "int4.h"

using namespace quintet;

namespace {

struct Rows : Int4 {
    void run(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        constexpr int MOST = LANES == 16 ? 6 : 2;
        if (M == 1) {
            for (i64 o = from; o < to; ++o) block<1, 1, true>(x, 0, o, put);
            return;
        }
        i64 o = from;
        for (; o + 2 <= to; o += 2)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<2, n(), false>(x, m, o, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<1, n(), false>(x, m, o, put); });
    }

  private:
    static Wide wide(const uint8_t* p) {
        Wide w;
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            const Words both = widen_unsigned(p + h * WORDS);
            w.parts[h] = low_half(both);
            w.parts[HALVES + h] = high_half(both);
        }
        return w;
    }

    template <int R, int MB, bool LINE>
    void block(const Input* x, i64 m0, i64 o, const Products& put) const {
        const i64 G = groups(), stride = G * (GROUP / 2);
        const uint8_t* p = q + o * stride;
        const uint8_t* next = p + R * stride;
        F acc[R][MB];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < MB; ++m) acc[r][m] = zero();
        for (i64 g0 = 0; g0 < G; g0 += LANES) {
            const i64 n = std::min(i64(LANES), G - g0);
            alignas(64) float by[R][MB][LANES];
            for (int r = 0; r < R; ++r) {
                const bf16* s = scale + (o + r) * G + g0;
                const F scales = n == LANES ? load(s) : load(s, n);
                for (int m = 0; m < MB; ++m) {
                    store(by[r][m], mul(scales, load(x[m0 + m].scale + g0)));
                    acc[r][m] = fma(scales, load(x[m0 + m].offset + g0), acc[r][m]);
                }
            }
            for (i64 j = 0; j < n; ++j) {
                const i64 g = g0 + j;
                Wide w[R];
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) {
                    if (LINE && g % 2 == 0) prefetch<_MM_HINT_T1>(p + g * 32, AHEAD);
                    if (!LINE && m0 == 0) prefetch<_MM_HINT_T1>(next + (g * R + r) * 32, 0);
                    w[r] = wide(p + r * stride + g * 32);
                }
#pragma GCC unroll 6
                for (int m = 0; m < MB; ++m) {
                    const int16_t* xg = x[m0 + m].group(g);
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r)
                        acc[r][m] = fma(products(w[r], xg), all(by[r][m][j]), acc[r][m]);
                }
            }
        }
        for (int m = 0; m < MB; ++m)
            for (int r = 0; r < R; ++r) put(m0 + m, o + r, sum(acc[r][m]));
    }
};

}  // namespace

void Int4::rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
    Rows{*this}.run(x, M, from, to, put);
}
