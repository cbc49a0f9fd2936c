// Causal attention and its gradient, text by text and head by head, for what learns.
//
// All is float32 inside, in blocks of BLOCK queries and keys (arXiv:2307.08691): with p the weights of
// a query, o what it attends to and L the logarithm of its sum of exponentials,
//
//     p = exp(q·k - L);  dv = pᵀ·do;  ds = p·(do·v - do·o);  dq = ds·k;  dk = dsᵀ·q
#pragma once
#include <memory>
#include <vector>

#include "accumulate.h"
#include "sequences.h"

namespace quintet {

constexpr i64 BLOCK = 64;

struct Heads {
    i64 H, K, D, V;  // of queries, of keys, and the sizes of theirs and of values

    bool fits() const { return H > 0 && K > 0 && H % K == 0 && D > 0 && V > 0 && D % 16 == 0 && V % 16 == 0; }
};

// Rows of a head by `by`, (n, D); zeros behind them up to whole blocks.
template <class T>
void take(const T* x, i64 step, i64 n, i64 D, float by, float* to) {
    for (i64 t = 0; t < n; ++t)
        for (i64 i = 0; i < D; i += LANES) store(to + t * D + i, mul(load(x + t * step + i), all(by)));
    std::fill(to + n * D, to + (n + BLOCK - 1) / BLOCK * BLOCK * D, 0.0f);
}

// Blocks of rows, each turned: (D, BLOCK) behind each other.
inline void turn(const float* x, i64 n, i64 D, float* to) {
    for (i64 from = 0; from < n; from += BLOCK, to += D * BLOCK, x += D * BLOCK)
        for (i64 t = 0; t < BLOCK; ++t)
            for (i64 i = 0; i < D; ++i) to[i * BLOCK + t] = x[t * D + i];
}

template <class T>
struct Causal {
    Heads z;
    float scale;
    Sequences sequences;
    const T *q, *k, *v;  // (M, H, D), (M, K, D), (M, K, V)

    struct Room {
        std::vector<float> q, k, v, turned_k, turned_v, scores, more, out, grad, for_q, sums;
    };
    static float* of(std::vector<float>& x, i64 n) {
        if (i64(x.size()) < n) x.resize(size_t(n));
        return x.data();
    }
    static i64 whole(i64 n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

    // q·k of a block of queries and one of keys; nothing is seen beyond the diagonal.
    void score(const float* q, const float* turned_k, i64 from, i64 at, float* to) const {
        std::fill_n(to, BLOCK * BLOCK, 0.0f);
        accumulate(to, BLOCK, q + from * z.D, z.D, 1, turned_k + at * z.D, BLOCK, BLOCK, z.D, BLOCK);
    }

    void forward(const Sequence& s, i64 h, T* out, float* logs, Room& room) const {
        const i64 n = s.length, N = whole(n), g = h / (z.H / z.K);
        float *Q = of(room.q, N * z.D), *K = of(room.k, N * z.D), *V = of(room.v, N * z.V);
        float *turned = of(room.turned_k, N * z.D), *scores = of(room.scores, BLOCK * BLOCK);
        float* o = of(room.out, BLOCK * z.V);
        take(q + (s.first * z.H + h) * z.D, z.H * z.D, n, z.D, scale, Q);
        take(k + (s.first * z.K + g) * z.D, z.K * z.D, n, z.D, 1.0f, K);
        take(v + (s.first * z.K + g) * z.V, z.K * z.V, n, z.V, 1.0f, V);
        turn(K, n, z.D, turned);
        for (i64 from = 0; from < n; from += BLOCK) {
            const i64 rows = std::min(BLOCK, n - from);
            float most[BLOCK], total[BLOCK];
            std::fill_n(most, BLOCK, -INFINITY);
            std::fill_n(total, BLOCK, 0.0f);
            std::fill_n(o, BLOCK * z.V, 0.0f);
            for (i64 at = 0; at <= from; at += BLOCK) {
                score(Q, turned, from, at, scores);
                for (i64 i = 0; i < rows; ++i) {
                    float* row = scores + i * BLOCK;
                    const i64 seen = at < from ? BLOCK : i + 1;
                    std::fill(row + seen, row + BLOCK, -INFINITY);
                    F high = load(row);
                    for (i64 j = LANES; j < BLOCK; j += LANES) high = max(high, load(row + j));
                    const float now = std::max(most[i], largest(high)), left = std::exp(most[i] - now);
                    F sum_ = zero();
                    for (i64 j = 0; j < BLOCK; j += LANES) {
                        const F e = exp_of(sub(load(row + j), all(now)));
                        store(row + j, e);
                        sum_ = add(sum_, e);
                    }
                    // What is beneath the least exponent is not nothing, and must be here.
                    std::fill(row + seen, row + BLOCK, 0.0f);
                    total[i] = total[i] * left + sum(sum_);
                    if (left != 1.0f)
                        for (i64 i2 = 0; i2 < z.V; i2 += LANES)
                            store(o + i * z.V + i2, mul(load(o + i * z.V + i2), all(left)));
                    most[i] = now;
                }
                accumulate(o, z.V, scores, BLOCK, 1, V + at * z.V, z.V, rows, BLOCK, z.V);
            }
            for (i64 i = 0; i < rows; ++i) {
                const i64 t = (s.first + from + i) * z.H + h;
                for (i64 c = 0; c < z.V; c += LANES)
                    store(out + t * z.V + c, mul(load(o + i * z.V + c), all(1.0f / total[i])));
                logs[t] = most[i] + std::log(total[i]);
            }
        }
    }

    // `for_k` (M, H, D) and `for_v` (M, H, V) are of this query head alone.
    void backward(const Sequence& s, i64 h, const T* out, const T* given, const float* logs, T* for_q,
                  float* for_k, float* for_v, Room& room) const {
        const i64 n = s.length, N = whole(n), g = h / (z.H / z.K);
        float *Q = of(room.q, N * z.D), *K = of(room.k, N * z.D), *V = of(room.v, N * z.V);
        float *turned_k = of(room.turned_k, N * z.D), *turned_v = of(room.turned_v, N * z.V);
        float *p = of(room.scores, BLOCK * BLOCK), *d = of(room.more, BLOCK * BLOCK);
        float *dO = of(room.grad, N * z.V), *dQ = of(room.for_q, N * z.D), *along = of(room.sums, N);
        const i64 first = s.first * z.H + h;
        take(q + first * z.D, z.H * z.D, n, z.D, scale, Q);
        take(k + (s.first * z.K + g) * z.D, z.K * z.D, n, z.D, 1.0f, K);
        take(v + (s.first * z.K + g) * z.V, z.K * z.V, n, z.V, 1.0f, V);
        take(given + first * z.V, z.H * z.V, n, z.V, 1.0f, dO);
        turn(K, n, z.D, turned_k);
        turn(V, n, z.V, turned_v);
        std::fill_n(dQ, N * z.D, 0.0f);
        for (i64 t = 0; t < n; ++t) {
            F sum_ = zero();
            const T* o = out + (first + t * z.H) * z.V;
            for (i64 c = 0; c < z.V; c += LANES) sum_ = fma(load(o + c), load(dO + t * z.V + c), sum_);
            along[t] = sum(sum_);
            std::fill_n(for_k + (first + t * z.H) * z.D, z.D, 0.0f);
            std::fill_n(for_v + (first + t * z.H) * z.V, z.V, 0.0f);
        }
        for (i64 at = 0; at < n; at += BLOCK) {
            const i64 keys = std::min(BLOCK, n - at);
            float *dK = for_k + (first + at * z.H) * z.D, *dV = for_v + (first + at * z.H) * z.V;
            for (i64 from = at; from < n; from += BLOCK) {
                const i64 rows = std::min(BLOCK, n - from);
                score(Q, turned_k, from, at, p);
                std::fill_n(d, BLOCK * BLOCK, 0.0f);
                accumulate(d, BLOCK, dO + from * z.V, z.V, 1, turned_v + at * z.V, BLOCK, rows, z.V, BLOCK);
                for (i64 i = 0; i < rows; ++i) {
                    float *row = p + i * BLOCK, *to = d + i * BLOCK;
                    const F log_ = all(logs[first + (from + i) * z.H]), back = all(along[from + i]);
                    for (i64 j = 0; j < BLOCK; j += LANES) store(row + j, exp_of(sub(load(row + j), log_)));
                    const i64 seen = std::min(at < from ? BLOCK : i + 1, keys);
                    std::fill(row + seen, row + BLOCK, 0.0f);
                    for (i64 j = 0; j < BLOCK; j += LANES)
                        store(to + j, mul(load(row + j), sub(load(to + j), back)));
                }
                accumulate(dV, z.H * z.V, p, 1, BLOCK, dO + from * z.V, z.V, keys, rows, z.V);
                accumulate(dK, z.H * z.D, d, 1, BLOCK, Q + from * z.D, z.D, keys, rows, z.D);
                accumulate(dQ + from * z.D, z.D, d, BLOCK, 1, K + at * z.D, z.D, rows, keys, z.D);
            }
        }
        for (i64 t = 0; t < n; ++t)
            for (i64 i = 0; i < z.D; i += LANES)
                store(for_q + (first + t * z.H) * z.D + i, mul(load(dQ + t * z.D + i), all(scale)));
    }
};

}  // namespace quintet
