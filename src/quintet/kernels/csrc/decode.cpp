// Attention of few queries a head, each by itself.
#include <omp.h>

#include "decode.h"

using namespace quintet;

namespace {

struct Steps {
    i64 row, head, token;
};

template <class T>
struct Call {
    i64 B, tokens, H, K, S, D, window;
    double scale;
    Span<const T> q;  // (B, H, tokens, D)
    Steps q_at;
    Span<const T> k;  // (B, K, S, D)
    Steps k_at;
    Span<const T> v;  // the same
    Steps v_at;
    Span<T> out;  // (B, tokens, H, D)

    const i64* starts() const { return behind<i64>(this); }  // (B) the slot of each row's first query
    i64 size() const { return i64(sizeof(Call)) + 8 * B; }
    bool fits() const {
        return B > 0 && tokens > 0 && K > 0 && H > 0 && H % K == 0 && D > 0 && D % 16 == 0 && window >= 0 &&
               q.holds({{B, q_at.row}, {H, q_at.head}, {tokens, q_at.token}, {D, 1}}) &&
               k.holds({{B, k_at.row}, {K, k_at.head}, {S, k_at.token}, {D, 1}}) &&
               v.holds({{B, v_at.row}, {K, v_at.head}, {S, v_at.token}, {D, 1}}) && out.holds(B * tokens * H * D) &&
               std::all_of(starts(), starts() + B, [this](i64 slot) { return 0 <= slot && slot <= S - tokens; });
    }
};

template <class T>
void decode(const Call<T>& c) {
    const float scale = float(c.scale);
    const i64 G = c.H / c.K, units = c.B * c.K * c.tokens, room = Partial::room(G, c.D), threads = omp_get_max_threads();
    const auto queries = [&](i64 unit) {
        const i64 b = unit / (c.K * c.tokens), kv = unit / c.tokens % c.K;
        return Queries<T>{c.q + b * c.q_at.row + kv * G * c.q_at.head + unit % c.tokens * c.q_at.token,
                          c.k + b * c.k_at.row + kv * c.k_at.head,
                          c.v + b * c.v_at.row + kv * c.v_at.head,
                          c.q_at.head, c.k_at.token, c.v_at.token, G, c.D};
    };
    const auto parts = [&](i64 unit) {
        const i64 end = c.starts()[unit / (c.K * c.tokens)] + unit % c.tokens + 1;
        return Parts(c.window ? std::max(i64(0), end - c.window) : 0, end);
    };
    const auto out = [&](i64 unit) {
        const i64 b = unit / (c.K * c.tokens), kv = unit / c.tokens % c.K;
        return c.out + ((b * c.tokens + unit % c.tokens) * c.H + kv * G) * c.D;
    };
    i64 keys = 0;
    std::vector<i64> firsts(size_t(units) + 1);
    for (i64 unit = 0; unit < units; ++unit) {
        keys += parts(unit).end - parts(unit).begin;
        firsts[size_t(unit) + 1] = firsts[size_t(unit)] + parts(unit).count;
    }
    const bool large = keys * c.D >= 8192;
    if (!large || units % threads == 0 || units >= 4 * threads) {
#pragma omp parallel if (large && units > 1)
        {
            std::vector<float> memory(size_t(2 * room));
            Partial sum(memory.data(), G, c.D), part(memory.data() + room, G, c.D);
#pragma omp for schedule(static)
            for (i64 unit = 0; unit < units; ++unit) {
                attend(queries(unit), parts(unit), scale, sum, part);
                sum.finish(out(unit));
            }
        }
        return;
    }
    std::vector<float> memory(size_t((firsts.back() + threads) * room));
    const auto partial = [&](i64 at) { return Partial(memory.data() + at * room, G, c.D); };
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (i64 at = 0; at < firsts.back(); ++at) {
            const i64 unit = std::upper_bound(firsts.begin(), firsts.end(), at) - firsts.begin() - 1;
            const i64 i = at - firsts[size_t(unit)];
            Partial part = partial(at);
            part.clear();
            attend(queries(unit), parts(unit).from(i), parts(unit).to(i), scale, part);
        }
        Partial sum = partial(firsts.back() + omp_get_thread_num());
#pragma omp for schedule(static)
        for (i64 unit = 0; unit < units; ++unit) {
            sum.clear();
            for (i64 at = firsts[size_t(unit)]; at < firsts[size_t(unit) + 1]; ++at) sum.add(partial(at));
            sum.finish(out(unit));
        }
    }
}

}  // namespace

QUINTET_ENTRY(decode_bf16, Call<bf16>, decode)
QUINTET_ENTRY(decode_f32, Call<float>, decode)
