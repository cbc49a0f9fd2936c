// Attention of few queries that share keys: bound by reading keys and values.
#pragma once
#include <vector>

#include "matrix.h"
#include "sequences.h"

namespace quintet {

// Keys that are scored before their values are added up, so that both stay in the cache.
constexpr i64 BLOCK = 128;

// A softmax in the making over some of the keys: values weighted by e^(score - most), their sum.
struct Partial {
    float *values, *most, *total;
    i64 G, D;

    // How many numbers it keeps in the memory it is given.
    static i64 room(i64 G, i64 D) { return (G * (D + 2) + LANES - 1) / LANES * LANES; }
    Partial(float* memory, i64 G, i64 D)
        : values(memory), most(memory + G * D), total(most + G), G(G), D(D) {}

    void clear() {
        std::fill(values, values + G * D, 0.0f);
        std::fill(most, most + G, -INFINITY);
        std::fill(total, total + G, 0.0f);
    }

    // What further keys made, of which there are some.
    void add(const Partial& other) {
        for (i64 g = 0; g < G; ++g) {
            const float top = std::max(most[g], other.most[g]);
            const float old = std::exp(most[g] - top), by = std::exp(other.most[g] - top);
            most[g] = top;
            total[g] = total[g] * old + other.total[g] * by;
            for (i64 d = g * D; d < (g + 1) * D; d += LANES)
                store(values + d, fma(load(other.values + d), all(by), mul(load(values + d), all(old))));
        }
    }

    // (G, D), at the end.
    template <class T>
    void finish(T* out) const {
        for (i64 g = 0; g < G; ++g) {
            const F share = all(1.0f / total[g]);
            for (i64 d = g * D; d < (g + 1) * D; d += LANES) store(out + d, mul(load(values + d), share));
        }
    }
};

template <class T, int GB>
void weigh(const T* v, i64 stride, i64 n, const float* scores, float* values, i64 D) {
    for (i64 d = 0; d < D; d += 2 * LANES) {
        const bool two = d + LANES < D;
        F acc[GB][2];
        for (int g = 0; g < GB; ++g) {
            acc[g][0] = load(values + g * D + d);
            acc[g][1] = two ? load(values + g * D + d + LANES) : zero();
        }
        for (i64 s = 0; s < n; ++s) {
            const F v0 = load(v + s * stride + d);
            const F v1 = two ? load(v + s * stride + d + LANES) : zero();
#pragma GCC unroll 8
            for (int g = 0; g < GB; ++g) {
                const F p = all(scores[g * BLOCK + s]);
                acc[g][0] = fma(p, v0, acc[g][0]);
                acc[g][1] = fma(p, v1, acc[g][1]);
            }
        }
        for (int g = 0; g < GB; ++g) {
            store(values + g * D + d, acc[g][0]);
            if (two) store(values + g * D + d + LANES, acc[g][1]);
        }
    }
}

// G queries that share keys and values, and the strides between tokens and heads.
template <class T>
struct Queries {
    const T *q, *k, *v;
    i64 q_head, k_token, v_token, G, D;
};

// How many keys before its use one is asked for. Its value is asked for with it: that comes a block later.
constexpr i64 KEYS_AHEAD = 16;

// Ask for four rows, `ahead` of p, of as many as there are.
template <class T>
inline void fetch(const T* p, i64 stride, i64 rows, i64 ahead, i64 D) {
    for (i64 s = ahead; s < std::min(ahead + 4, rows); ++s)
        for (i64 d = 0; d < D; d += 64 / i64(sizeof(T))) prefetch<_MM_HINT_T0>(p + s * stride + d, 0);
}

// The scores of N keys, one behind the other, with each query: (G, BLOCK).
template <int N, class T>
inline void score(const Queries<T>& c, const T* key, float scale, float* to) {
    using C = Chunk<T>;
    for (i64 g = 0; g < c.G; ++g) {
        const T* query = c.q + g * c.q_head;
        F acc[N];
        for (F& sum : acc) sum = zero();
        i64 d = 0;
        for (; d + C::SIZE <= c.D; d += C::SIZE)
            for (int s = 0; s < N; ++s) acc[s] = C::dot_to(acc[s], C::at(query + d), C::at(key + s * c.k_token + d));
        if (d < c.D)
            for (int s = 0; s < N; ++s) acc[s] = C::dot_to(acc[s], C::at(query + d, c.D - d), C::at(key + s * c.k_token + d, c.D - d));
        float made[N];
        row_sums<N>([&](int s) { return acc[s]; }, made);
        for (int s = 0; s < N; ++s) to[g * BLOCK + s] = made[s] * scale;
    }
}

// The keys [from, to), added to what `part` has.
template <class T>
void attend(const Queries<T>& c, i64 from, i64 to, float scale, Partial& part) {
    const i64 G = c.G, D = c.D;
    const T *k = c.k, *v = c.v;
    std::vector<float> scores(size_t(G * BLOCK));
    for (i64 s0 = from; s0 < to; s0 += BLOCK) {
        const i64 n = std::min(BLOCK, to - s0);
        i64 s = 0;
        for (; s + 4 <= n; s += 4) {
            fetch(k + (s0 + s) * c.k_token, c.k_token, to - s0 - s, KEYS_AHEAD, D);
            fetch(v + (s0 + s) * c.v_token, c.v_token, n - s, 0, D);
            score<4>(c, k + (s0 + s) * c.k_token, scale, scores.data() + s);
        }
        for (; s < n; ++s) score<1>(c, k + (s0 + s) * c.k_token, scale, scores.data() + s);
        for (i64 g = 0; g < G; ++g) {
            float* row = scores.data() + g * BLOCK;
            std::fill(row + n, row + (n + LANES - 1) / LANES * LANES, -INFINITY);
            F top = all(part.most[g]);
            for (i64 s = 0; s < n; s += LANES) top = max(load(row + s), top);
            const float most = largest(top), before = part.most[g];
            const float shrink = before == -INFINITY ? 0.0f : std::exp(before - most);
            F total = zero();
            for (i64 s = 0; s < n; s += LANES) {
                const F p = exp_of(sub(load(row + s), all(most)));
                store(row + s, p);
                total = add(total, p);
            }
            part.most[g] = most;
            part.total[g] = part.total[g] * shrink + sum(total);
            float* values = part.values + g * D;
            if (shrink != 1.0f)
                for (i64 d = 0; d < D; d += LANES) store(values + d, mul(load(values + d), all(shrink)));
        }
        in_blocks<LANES / 2>(G, [&](i64 g, auto GB) {
            weigh<T, GB()>(v + s0 * c.v_token, c.v_token, n, scores.data() + g * BLOCK, part.values + g * D, D);
        });
    }
}

// All keys of some parts, one part behind the other; `part` is room to work in.
template <class T>
void attend(const Queries<T>& c, const Parts& parts, float scale, Partial& sum, Partial& part) {
    sum.clear();
    for (i64 i = 0; i < parts.count; ++i) {
        part.clear();
        attend(c, parts.from(i), parts.to(i), scale, part);
        sum.add(part);
    }
}

}  // namespace quintet
