// Attention of one query a head.
#include <omp.h>

#include "decode.h"

namespace {

struct Call {
    const void *q, *k, *v;
    void* out;  // (B, H, D)
    i64 q_row, q_head;
    i64 k_row, k_head, k_token;
    i64 v_row, v_head, v_token;
    const i64* lengths;  // (B) keys each row sees the end of
    i64 B, H, K, D, window;
};

template <class T>
void decode(const Call& c, float scale) {
    const i64 G = c.H / c.K, units = c.B * c.K;
    i64 longest = 0;
    for (i64 b = 0; b < c.B; ++b) longest = std::max(longest, c.lengths[b]);
    if (c.window) longest = std::min(longest, c.window);
    const i64 splits = parts_of(units, omp_get_max_threads(), longest);
    const i64 room = Partial::room(G, c.D);
    std::vector<float> memory(size_t(units * splits * room));
    std::vector<Partial> parts;
    for (i64 at = 0; at < units * splits; ++at) {
        parts.emplace_back(memory.data() + at * room, G, c.D);
        parts.back().clear();
    }
#pragma omp parallel for if (units * splits > 1 && units * longest * c.D >= 8192) schedule(static)
    for (i64 at = 0; at < units * splits; ++at) {
        const i64 unit = at / splits, b = unit / c.K, kv = unit % c.K;
        const Queries<T> queries{static_cast<const T*>(c.q) + b * c.q_row + kv * G * c.q_head,
                             static_cast<const T*>(c.k) + b * c.k_row + kv * c.k_head,
                             static_cast<const T*>(c.v) + b * c.v_row + kv * c.v_head,
                             c.q_head, c.k_token, c.v_token, G, c.D};
        const i64 end = c.lengths[b], start = c.window ? std::max(i64(0), end - c.window) : 0;
        const Share mine(end - start, at % splits, splits);
        attend(queries, start + mine.from, start + mine.to, scale, parts[size_t(at)]);
    }
    T* out = static_cast<T*>(c.out);
    for (i64 unit = 0; unit < units; ++unit)
        merge(&parts[size_t(unit * splits)], splits, G, c.D,
              out + (unit / c.K * c.H + unit % c.K * G) * c.D);
}

}  // namespace

extern "C" {
void quintet_decode_bf16(const Call* call, float scale) { decode<bf16>(*call, scale); }
void quintet_decode_f32(const Call* call, float scale) { decode<float>(*call, scale); }
}
