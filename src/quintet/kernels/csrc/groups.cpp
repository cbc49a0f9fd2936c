// Products of integers in groups.
#include "groups.h"

using namespace quintet;

namespace {

// How many sums products of a row and a vector go into, so that none waits for another.
template <int UNIT>
constexpr int WAYS = UNIT == GROUP ? 1 : 2;

// Add Σ by · n x over 64 columns, of units with a scale each.
template <int UNIT>
__attribute__((always_inline)) inline void add_products(const Wide& w, const int16_t* x, const float* by, F (&to)[WAYS<UNIT>]) {
    if constexpr (UNIT == GROUP) {
        to[0] = fma(products(w, x), all(by[0]), to[0]);
    } else if constexpr (UNIT == 32) {
#pragma GCC unroll 2
        for (int unit = 0; unit < 2; ++unit) {
            Words sum = no_words();
#pragma GCC unroll 2
            for (int h = unit * HALVES; h < (unit + 1) * HALVES; ++h) sum = pair_products(sum, w.parts[h], words(x + h * WORDS));
            to[unit] = fma(to_float(sum), all(by[unit]), to[unit]);
        }
    } else {
#pragma GCC unroll 4
        for (int h = 0; h < 2 * HALVES; ++h) {
            const F one = to_float(pair_products(no_words(), w.parts[h], words(x + h * WORDS)));
#if defined(__AVX512F__)
            const F scale = both(by[2 * h], by[2 * h + 1]);
#else
            const F scale = all(by[h]);
#endif
            to[h / HALVES] = fma(one, scale, to[h / HALVES]);
        }
    }
}

struct Rows : Groups {
    void run(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        const auto with = [&](auto numbers, auto unit) { of_kind<Numbers(numbers()), unit()>(x, M, from, to, put); };
        const i64 unit = std::min(layout.group, GROUP);
        switch (layout.numbers) {
            case BYTES:
                if (unit == 16) return with(Constant<BYTES>(), Constant<16>());
                if (unit == 32) return with(Constant<BYTES>(), Constant<32>());
                return with(Constant<BYTES>(), Constant<GROUP>());
            case NIBBLES:
                if (unit == 32) return with(Constant<NIBBLES>(), Constant<32>());
                return with(Constant<NIBBLES>(), Constant<GROUP>());
            case IQ4:
                return with(Constant<IQ4>(), Constant<32>());
        }
    }

  private:
    template <i64 N>
    using Constant = std::integral_constant<i64, N>;

    // What all rows have in common.
    struct Sizes {
        i64 G, stride;
        int group;  // a power of two
        Places of_groups, of_vectors;
    };

    template <Numbers N, int UNIT>
    void of_kind(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        constexpr int MOST = LANES == 16 ? 4 : 2;
        const Sizes sizes{layout.groups(I), layout.row_bytes(I), __builtin_ctzll(uint64_t(layout.group)),
                          spread(UNIT, layout.group), spread(UNIT, GROUP)};
        i64 o = from;
        for (; M > 1 && o + 2 <= to; o += 2)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<N, UNIT, 2, n()>(x, m, o, sizes, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<N, UNIT, 1, n()>(x, m, o, sizes, put); });
    }

    // R rows by MB vectors. Scales of as many units as a vector has lanes are made ready at once.
    template <Numbers N, int UNIT, int R, int MB>
    void block(const Input* x, i64 m0, i64 o, const Sizes& sizes, const Products& put) const {
        constexpr i64 CHUNK = LANES * UNIT, STEP = N == BYTES ? GROUP : GROUP / 2;
        const i64 G = sizes.G, stride = sizes.stride;
        const char* p = q + o * stride;
        const char* next = p + R * stride;
        F acc[R][MB][WAYS<UNIT>];
        for (auto& row : acc)
            for (auto& ways : row)
                for (F& sum : ways) sum = zero();
        for (i64 start = 0; start < I; start += CHUNK) {
            const i64 end = std::min(start + CHUNK, I);
            const i64 g = start >> sizes.group, n = ((end - 1) >> sizes.group) - g + 1;
            const i64 s = start / GROUP, spans = (end - 1) / GROUP - s + 1, u = start / UNIT;
            alignas(64) float by[R][MB][LANES];
            for (int r = 0; r < R; ++r) {
                const i64 at = (o + r) * G + g;
                const F scales = taken(load_reals(scale, layout.real, at, n), sizes.of_groups);
                F more = mul(scales, all(-8.0f));
                if (offset) more = taken(load_reals(offset, layout.real, at, n), sizes.of_groups);
                for (int m = 0; m < MB; ++m) {
                    const Input& v = x[m0 + m];
                    store(by[r][m], mul(scales, taken(load(v.x.scale + s, spans), sizes.of_vectors)));
                    if (N == NIBBLES || offset) acc[r][m][0] = fma(more, load(v.template sums<UNIT>() + u), acc[r][m][0]);
                }
            }
            for (i64 i = start; i < end; i += GROUP) {
                const i64 at = i / GROUP * STEP;
                Wide w[R];
                if (N == BYTES && __builtin_expect(i + GROUP > I, 0)) {
                    for (int r = 0; r < R; ++r) w[r] = last(p + r * stride + at, I - i);
                } else {
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) {
                        if (R == 1 && at % 64 == 0) prefetch<_MM_HINT_T1>(p + at, AHEAD);
                        if (R > 1 && m0 == 0) prefetch<_MM_HINT_T1>(next + at * R + r * STEP, 0);
                        w[r] = widened<N>(p + r * stride + at);
                    }
                }
                const i64 unit = (i - start) / UNIT;
#pragma GCC unroll 4
                for (int m = 0; m < MB; ++m) {
                    const int16_t* xs = x[m0 + m].x.values + i;
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) add_products<UNIT>(w[r], xs, by[r][m] + unit, acc[r][m]);
                }
            }
        }
        for (int m = 0; m < MB; ++m)
            for (int r = 0; r < R; ++r) {
                F total = acc[r][m][0];
                if constexpr (WAYS<UNIT> == 2) total = add(total, acc[r][m][1]);
                put(m0 + m, o + r, sum(total));
            }
    }

    // Which of several values, one for each `wide` columns, is that of each unit.
    static Places spread(i64 unit, i64 wide) {
        alignas(64) int32_t at[LANES];
        for (int l = 0; l < LANES; ++l) at[l] = int32_t(l * unit / wide);
        return places(at);
    }

    // What is left of a row of bytes, behind which another one lies or nothing.
    static Wide last(const char* p, i64 n) {
        alignas(64) char rest[GROUP] = {};
        std::memcpy(rest, p, size_t(n));
        return widened<BYTES>(rest);
    }
};

}  // namespace

void Groups::rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
    Rows{*this}.run(x, M, from, to, put);
}
