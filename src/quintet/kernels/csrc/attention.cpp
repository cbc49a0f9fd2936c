// Attention of many queries over the keys before them, block by block, without the score matrix
// (arXiv:2307.08691). Queries and keys may come in two parts, which saves joining them: the second
// part of the keys is one for all heads in latent attention.
#include <omp.h>

#include <vector>

#include "simd.h"

namespace {

constexpr i64 QUERIES = 48, KEYS = 4 * LANES;  // of a block

// A tensor of vectors by batch row, head and token; a head's stride may be 0.
struct Vectors {
    const bf16* data;
    i64 row, head, token, size;
    const bf16* at(i64 b, i64 h, i64 t) const { return data + b * row + h * head + t * token; }
};

// Eight-byte fields, as Python fills them.
struct Attention {
    Vectors q[2], k[2], v;  // the second part may be empty
    bf16* out;
    i64 out_row, out_head, out_token;
    const i64* starts;          // (B) the slot of each row's first query
    i64 B, H, K, T, S, window;  // window 0: no limit

    i64 padded() const { return (q[0].size + q[1].size + 1) / 2 * 2; }  // numbers, in pairs
    i64 last(i64 b, i64 t) const { return std::min(starts[b] + t, S - 1); }
    i64 first(i64 b, i64 t) const { return window ? std::max<i64>(0, starts[b] + t - window + 1) : 0; }
};

inline Pairs pair_of(const bf16* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
#if defined(__AVX512F__)
    return _mm512_set1_epi32(both);
#else
    return _mm256_set1_epi32(both);
#endif
}

// out[i][0:4] = fade[i] · out[i] + Σ_k a[i][k] m[k], k in pairs; m has each pair of k side by side.
template <int I, int V>
inline void tile(float* out, i64 ldo, const float* fade, const bf16* a, i64 lda, const bf16* m,
                 i64 ldm, i64 pairs) {
    F acc[I][V];
    for (int i = 0; i < I; ++i)
        for (int v = 0; v < V; ++v)
            acc[i][v] = fade ? mul(load(out + i * ldo + v * LANES), all(fade[i])) : zero();
    for (i64 k = 0; k < pairs; ++k) {
        Pairs row[V];
        for (int v = 0; v < V; ++v) row[v] = load_pairs(m + k * ldm + v * 2 * LANES);
        for (int i = 0; i < I; ++i) {
            const Pairs x = pair_of(a + i * lda + 2 * k);
            for (int v = 0; v < V; ++v) acc[i][v] = dot(acc[i][v], x, row[v]);
        }
    }
    for (int i = 0; i < I; ++i)
        for (int v = 0; v < V; ++v) store(out + i * ldo + v * LANES, acc[i][v]);
}

template <int V>
inline void tiles(float* out, i64 ldo, const float* fade, const bf16* a, i64 lda, const bf16* m,
                  i64 ldm, i64 pairs, i64 rows) {
    for (i64 i = 0; i < rows; i += 6)
        tile<6, V>(out + i * ldo, ldo, fade ? fade + i : nullptr, a + i * lda, lda, m, ldm, pairs);
}

// Keys of a head, block by block: for each pair of numbers, the pairs of all keys of the block.
void pack_keys(const Attention& p, i64 b, i64 kv, i64 block, bf16* to) {
    const i64 from = block * KEYS, count = std::min(KEYS, p.S - from);
    std::memset(to, 0, size_t(KEYS * p.padded()) * sizeof(bf16));
    for (i64 s = 0; s < count; ++s) {
        i64 d = 0;
        for (const Vectors& part : p.k) {
            if (!part.size) continue;
            const bf16* x = part.at(b, kv, from + s);
            for (i64 i = 0; i < part.size; ++i, ++d) to[(d / 2 * KEYS + s) * 2 + d % 2] = x[i];
        }
    }
}

// Values of a head: for each pair of keys, the pairs of all numbers.
void pack_values(const Attention& p, i64 b, i64 kv, i64 block, bf16* to) {
    const i64 from = block * KEYS, count = std::min(KEYS, p.S - from), D = p.v.size;
    for (i64 s = 0; s < KEYS; s += 2) {
        bf16* pairs = to + s * D;
        for (int half = 0; half < 2; ++half) {
            const bf16* x = s + half < count ? p.v.at(b, kv, from + s + half) : nullptr;
            for (i64 d = 0; d < D; ++d) pairs[2 * d + half] = x ? x[d] : bf16{0};
        }
    }
}

struct Scratch {
    std::vector<bf16> queries, weights;
    std::vector<float> scores, out;
    Scratch(i64 D, i64 Dv)
        : queries(QUERIES * D), weights(QUERIES * KEYS), scores(QUERIES * KEYS), out(QUERIES * Dv) {}
};

// The queries t0 to t0 + rows of a head.
void block_of(const Attention& p, i64 b, i64 h, i64 t0, const bf16* keys, const bf16* values,
              float scale, Scratch& s) {
    const i64 rows = std::min(QUERIES, p.T - t0), D = p.padded(), Dv = p.v.size;
    const i64 filled = (rows + 5) / 6 * 6;
    std::fill(s.queries.begin(), s.queries.end(), bf16{0});
    for (i64 i = 0; i < rows; ++i) {
        bf16* to = &s.queries[i * D];
        for (const Vectors& part : p.q)
            if (part.size) to = std::copy_n(part.at(b, h, t0 + i), part.size, to);
    }
    float largest_of[QUERIES], total[QUERIES], fade[QUERIES];
    std::fill_n(largest_of, QUERIES, -INFINITY);
    std::fill_n(total, QUERIES, 0.0f);
    std::fill(s.out.begin(), s.out.end(), 0.0f);
    const float unit = scale * 1.44269504f;  // powers of two cost less than of e

    const i64 begin = p.first(b, t0) / KEYS, end = p.last(b, t0 + rows - 1) / KEYS + 1;
    for (i64 block = begin; block < end; ++block) {
        const i64 from = block * KEYS;
        tiles<4>(s.scores.data(), KEYS, nullptr, s.queries.data(), D, keys + block * KEYS * D,
                 2 * KEYS, D / 2, filled);
        for (i64 i = 0; i < filled; ++i) {
            float* x = &s.scores[i * KEYS];
            const i64 row = std::min(t0 + i, t0 + rows - 1);
            const i64 low = p.first(b, row) - from, high = p.last(b, row) - from;
            if (low > 0 || high < KEYS - 1)
                for (i64 j = 0; j < KEYS; ++j)
                    if (j < low || j > high) x[j] = -INFINITY;
            F parts[4], most = all(largest_of[i]);
            for (int v = 0; v < 4; ++v) {
                parts[v] = mul(load(x + v * LANES), all(unit));
                most = max(most, parts[v]);
            }
            const float now = largest(most);
            const float level = now == -INFINITY ? 0.0f : now;
            fade[i] = largest_of[i] == -INFINITY ? 0.0f : std::exp2(largest_of[i] - now);
            largest_of[i] = now;
            F sums = zero();
            for (int v = 0; v < 4; ++v) {
                const F e = power_of_two(sub(parts[v], all(level)));
                sums = add(sums, e);
                store(&s.weights[i * KEYS + v * LANES], e);
            }
            total[i] = total[i] * fade[i] + sum(sums);
        }
        i64 d = 0;
        for (; d + 4 * LANES <= Dv; d += 4 * LANES)
            tiles<4>(&s.out[d], Dv, fade, s.weights.data(), KEYS, values + block * KEYS * Dv + 2 * d,
                     2 * Dv, KEYS / 2, filled);
        for (; d < Dv; d += LANES)
            tiles<1>(&s.out[d], Dv, fade, s.weights.data(), KEYS, values + block * KEYS * Dv + 2 * d,
                     2 * Dv, KEYS / 2, filled);
    }
    for (i64 i = 0; i < rows; ++i) {
        bf16* to = p.out + b * p.out_row + h * p.out_head + (t0 + i) * p.out_token;
        const F share = all(1.0f / total[i]);
        for (i64 d = 0; d < Dv; d += LANES) store(to + d, mul(load(&s.out[i * Dv + d]), share));
    }
}

}  // namespace

extern "C" void quintet_attention(const Attention* given, float scale) {
    const Attention& p = *given;
    const i64 group = p.H / p.K, Dv = p.v.size, tasks = (p.T + QUERIES - 1) / QUERIES * group;
    i64 longest = 0;
    for (i64 b = 0; b < p.B; ++b) longest = std::max(longest, p.last(b, p.T - 1) + 1);
    const i64 blocks = (longest + KEYS - 1) / KEYS;
    std::vector<bf16> keys(blocks * KEYS * p.padded()), values(blocks * KEYS * Dv);
#pragma omp parallel
    {
        Scratch scratch(p.padded(), Dv);
        for (i64 b = 0; b < p.B; ++b) {
            for (i64 kv = 0; kv < p.K; ++kv) {
#pragma omp for schedule(static)
                for (i64 i = 0; i < blocks; ++i) {
                    pack_keys(p, b, kv, i, &keys[i * KEYS * p.padded()]);
                    pack_values(p, b, kv, i, &values[i * KEYS * Dv]);
                }
                // The longest first: with a cost that grows along the text, what is left for the
                // end is short.
#pragma omp for schedule(dynamic)
                for (i64 task = tasks - 1; task >= 0; --task)
                    block_of(p, b, kv * group + task % group, task / group * QUERIES, keys.data(),
                             values.data(), scale, scratch);
            }
        }
    }
}
