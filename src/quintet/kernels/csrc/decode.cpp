// Attention of one query a head: bound by reading keys and values.
#include <omp.h>

#include <vector>

#include "simd.h"

namespace {

// Keys that are scored before their values are added up, so that both stay in the cache.
constexpr i64 BLOCK = 128;
// The least keys for which a row is worth being split among threads.
constexpr i64 LEAST = 256;

struct Call {
    const void *q, *k, *v;
    void* out;  // (B, H, D)
    i64 q_row, q_head;
    i64 k_row, k_head, k_token;
    i64 v_row, v_head, v_token;
    const i64* lengths;  // (B) keys each row sees the end of
    i64 B, H, K, D, window;
};

// A softmax in the making over some of the keys: values weighted by e^(score - most), their sum.
struct Partial {
    std::vector<float> values;
    std::vector<float> most, total;
    Partial(i64 G, i64 D) : values(size_t(G * D)), most(size_t(G), -INFINITY), total(size_t(G)) {}
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

template <class T>
void attend(const Call& c, i64 b, i64 kv, i64 from, i64 to, float scale, Partial& part) {
    using C = Chunk<T>;
    const i64 G = c.H / c.K, D = c.D;
    const T* q = static_cast<const T*>(c.q) + b * c.q_row + kv * G * c.q_head;
    const T* k = static_cast<const T*>(c.k) + b * c.k_row + kv * c.k_head;
    const T* v = static_cast<const T*>(c.v) + b * c.v_row + kv * c.v_head;
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
            F top = all(part.most[size_t(g)]);
            for (i64 s = 0; s < n; s += LANES) top = max(load(row + s), top);
            const float most = largest(top), before = part.most[size_t(g)];
            const float shrink = before == -INFINITY ? 0.0f : std::exp(before - most);
            F total = zero();
            for (i64 s = 0; s < n; s += LANES) {
                const F p = exp_of(sub(load(row + s), all(most)));
                store(row + s, p);
                total = add(total, p);
            }
            part.most[size_t(g)] = most;
            part.total[size_t(g)] = part.total[size_t(g)] * shrink + sum(total);
            float* values = part.values.data() + g * D;
            if (shrink != 1.0f)
                for (i64 d = 0; d < D; d += LANES) store(values + d, mul(load(values + d), all(shrink)));
        }
        i64 g = 0;
        const T* first = v + s0 * c.v_token;
        for (; g + 4 <= G; g += 4)
            weigh<T, 4>(first, c.v_token, n, scores.data() + g * BLOCK, part.values.data() + g * D, D);
        for (; g < G; ++g)
            weigh<T, 1>(first, c.v_token, n, scores.data() + g * BLOCK, part.values.data() + g * D, D);
    }
}

template <class T>
void decode(const Call& c, float scale) {
    const i64 G = c.H / c.K, units = c.B * c.K;
    i64 longest = 0;
    for (i64 b = 0; b < c.B; ++b) longest = std::max(longest, c.lengths[b]);
    if (c.window) longest = std::min(longest, c.window);
    const i64 threads = omp_get_max_threads();
    const i64 wanted = units % threads ? (threads + units - 1) / units * (units < threads ? 1 : 2) : 1;
    const i64 splits = std::max(i64(1), std::min(wanted, longest / LEAST));
    std::vector<Partial> parts(size_t(units * splits), Partial(G, c.D));
#pragma omp parallel for if (units * splits > 1 && units * longest * c.D >= 8192) schedule(static)
    for (i64 at = 0; at < units * splits; ++at) {
        const i64 unit = at / splits, b = unit / c.K;
        const i64 end = c.lengths[b], start = c.window ? std::max(i64(0), end - c.window) : 0;
        const Share mine(end - start, at % splits, splits);
        attend<T>(c, b, unit % c.K, start + mine.from, start + mine.to, scale, parts[size_t(at)]);
    }
    T* out = static_cast<T*>(c.out);
    for (i64 unit = 0; unit < units; ++unit)
        for (i64 g = 0; g < G; ++g) {
            float most = -INFINITY, total = 0;
            for (i64 i = 0; i < splits; ++i) most = std::max(most, parts[size_t(unit * splits + i)].most[size_t(g)]);
            for (i64 i = 0; i < splits; ++i) {
                const Partial& p = parts[size_t(unit * splits + i)];
                if (p.total[size_t(g)] > 0) total += p.total[size_t(g)] * std::exp(p.most[size_t(g)] - most);
            }
            T* to = out + (unit / c.K * c.H + unit % c.K * G + g) * c.D;
            for (i64 d = 0; d < c.D; d += LANES) {
                F y = zero();
                for (i64 i = 0; i < splits; ++i) {
                    const Partial& p = parts[size_t(unit * splits + i)];
                    if (p.total[size_t(g)] > 0)
                        y = fma(load(p.values.data() + g * c.D + d),
                                all(std::exp(p.most[size_t(g)] - most) / total), y);
                }
                store(to + d, y);
            }
        }
}

}  // namespace

extern "C" {
void quintet_decode_bf16(const Call* call, float scale) { decode<bf16>(*call, scale); }
void quintet_decode_f32(const Call* call, float scale) { decode<float>(*call, scale); }
}
