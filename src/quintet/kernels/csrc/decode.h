// Attention of few queries that share keys: bound by reading keys and values.
#pragma once
#include <vector>

#include "sequences.h"

namespace {

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

// The keys [from, to), added to what `part` has.
template <class T>
void attend(const Queries<T>& c, i64 from, i64 to, float scale, Partial& part) {
    using C = Chunk<T>;
    const i64 G = c.G, D = c.D;
    const T *q = c.q, *k = c.k, *v = c.v;
    std::vector<float> scores(size_t(G * BLOCK));
    for (i64 s0 = from; s0 < to; s0 += BLOCK) {
        const i64 n = std::min(BLOCK, to - s0);
        for (i64 s = 0; s < n; ++s) {
            const T* key = k + (s0 + s) * c.k_token;
            for (i64 g = 0; g < G; ++g) {
                const T* query = q + g * c.q_head;
                F acc = zero();
                i64 d = 0;
                for (; d + C::SIZE <= D; d += C::SIZE)
                    acc = C::dot_to(acc, C::at(query + d), C::at(key + d));
                if (d < D) acc = C::dot_to(acc, C::at(query + d, D - d), C::at(key + d, D - d));
                scores[size_t(g * BLOCK + s)] = sum(acc) * scale;
            }
        }
        for (i64 g = 0; g < G; ++g) {
            float* row = scores.data() + g * BLOCK;
            for (i64 s = n; s < (n + LANES - 1) / LANES * LANES; ++s) row[s] = -INFINITY;
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
        i64 g = 0;
        const T* first = v + s0 * c.v_token;
        for (; g + 4 <= G; g += 4)
            weigh<T, 4>(first, c.v_token, n, scores.data() + g * BLOCK, part.values + g * D, D);
        for (; g < G; ++g)
            weigh<T, 1>(first, c.v_token, n, scores.data() + g * BLOCK, part.values + g * D, D);
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

}  // namespace
