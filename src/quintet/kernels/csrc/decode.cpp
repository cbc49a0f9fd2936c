// Attention of one query a head.
#include <omp.h>

#include "decode.h"
#include "span.h"

namespace {

struct Steps {
    i64 row, head, token;
};

template <class T>
struct Call {
    i64 B, H, K, S, D, window;
    double scale;
    Span<const T> q;  // (B, H, 1, D)
    Steps q_at;
    Span<const T> k;  // (B, K, S, D)
    Steps k_at;
    Span<const T> v;  // the same
    Steps v_at;
    Span<T> out;  // (B, H, D)

    const i64* lengths() const { return behind<i64>(this); }  // (B) keys each row sees the end of
    i64 size() const { return i64(sizeof(Call)) + 8 * B; }
    bool fits() const {
        return B > 0 && K > 0 && H > 0 && H % K == 0 && D > 0 && D % 16 == 0 && window >= 0 &&
               q.holds({{B, q_at.row}, {H, q_at.head}, {D, 1}}) &&
               k.holds({{B, k_at.row}, {K, k_at.head}, {S, k_at.token}, {D, 1}}) &&
               v.holds({{B, v_at.row}, {K, v_at.head}, {S, v_at.token}, {D, 1}}) && out.holds(B * H * D) &&
               std::all_of(lengths(), lengths() + B, [this](i64 n) { return 0 < n && n <= S; });
    }
};

template <class T>
void decode(const Call<T>& c) {
    const float scale = float(c.scale);
    const i64 G = c.H / c.K, units = c.B * c.K;
    i64 longest = 0;
    for (i64 b = 0; b < c.B; ++b) longest = std::max(longest, c.lengths()[b]);
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
        const Queries<T> queries{c.q + b * c.q_at.row + kv * G * c.q_at.head,
                             c.k + b * c.k_at.row + kv * c.k_at.head,
                             c.v + b * c.v_at.row + kv * c.v_at.head,
                             c.q_at.head, c.k_at.token, c.v_at.token, G, c.D};
        const i64 end = c.lengths()[b], start = c.window ? std::max(i64(0), end - c.window) : 0;
        const Share mine(end - start, at % splits, splits);
        attend(queries, start + mine.from, start + mine.to, scale, parts[size_t(at)]);
    }
    for (i64 unit = 0; unit < units; ++unit)
        merge(&parts[size_t(unit * splits)], splits, G, c.D,
              c.out + (unit / c.K * c.H + unit % c.K * G) * c.D);
}

}  // namespace

QUINTET_ENTRY(decode_bf16, Call<bf16>, decode)
QUINTET_ENTRY(decode_f32, Call<float>, decode)
