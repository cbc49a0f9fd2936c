// Latent attention in the space of the latents (arXiv:2405.04434, §2.1.2): queries are mapped there
// by W_UK, all heads share the latents as one key and one value, and W_UV maps what comes out.
#include "attention.h"

namespace {

// Eight-byte fields, as Python fills them. w (H, Dn + Dv, R) is whole; q_latent and mixed, each
// (B, T, H, R), are room to compute in; out is (B, T, H, Dv).
struct Latent {
    i64 B, T, S, H, Dn, Dr, Dv, R;
    const bf16 *q_nope, *q_pe, *c_kv, *k_pe, *w;
    bf16 *q_latent, *mixed, *out;
    Strides nope_at, pe_at, c_at, k_at;
    const i64* start;
};

constexpr int TOKENS = LANES == 16 ? 4 : 2;  // whose sums are in registers at once

// q_latent = W_UKᵀ q_nope: lanes are columns of W, whose rows are taken in pairs.
template <int N>
void map_query(const Latent& a, i64 n0, i64 h, i64 c) {
    const bf16* w = a.w + h * (a.Dn + a.Dv) * a.R + c;
    const bf16* q[N];
    F acc[N][2];
    for (int i = 0; i < N; ++i) {
        const i64 b = (n0 + i) / a.T, t = (n0 + i) % a.T;
        q[i] = a.q_nope + b * a.nope_at.row + t * a.nope_at.token + h * a.nope_at.head;
        acc[i][0] = acc[i][1] = zero();
    }
    for (i64 d = 0; d < a.Dn; d += 2) {
        Pairs low, high;
        zip(load_pairs(w + d * a.R), load_pairs(w + (d + 1) * a.R), &low, &high);
        for (int i = 0; i < N; ++i) {
            const Pairs pair = same_pair(q[i] + d);
            acc[i][0] = dot(acc[i][0], low, pair);
            acc[i][1] = dot(acc[i][1], high, pair);
        }
    }
    for (int i = 0; i < N; ++i) {
        bf16* to = a.q_latent + ((n0 + i) * a.H + h) * a.R + c;
        F first, second;
        columns(acc[i][0], acc[i][1], &first, &second);
        store(to, first);
        store(to + LANES, second);
    }
}

// out = W_UV mixed: dot products of rows of W.
template <int N>
void map_value(const Latent& a, i64 n0, i64 h, i64 d) {
    const bf16* w = a.w + (h * (a.Dn + a.Dv) + a.Dn + d) * a.R;
    const i64 last = std::min<i64>(3, a.Dv - 1 - d);
    F acc[N][4];
    for (int i = 0; i < N; ++i)
        for (int r = 0; r < 4; ++r) acc[i][r] = zero();
    for (i64 c = 0; c < a.R; c += 2 * LANES) {
        Pairs rows[4];
        for (int r = 0; r < 4; ++r) rows[r] = load_pairs(w + std::min<i64>(r, last) * a.R + c);
        for (int i = 0; i < N; ++i) {
            const Pairs x = load_pairs(a.mixed + ((n0 + i) * a.H + h) * a.R + c);
            for (int r = 0; r < 4; ++r) acc[i][r] = dot(acc[i][r], rows[r], x);
        }
    }
    for (int i = 0; i < N; ++i) {
        float four[4];
        sums(acc[i][0], acc[i][1], acc[i][2], acc[i][3], four);
        for (i64 r = 0; r <= last; ++r) narrow(four[r], a.out + ((n0 + i) * a.H + h) * a.Dv + d + r);
    }
}

void map_queries(const Latent& a) {
    const i64 N = a.B * a.T, panels = a.R / (2 * LANES);
#pragma omp parallel for schedule(static)
    for (i64 job = 0; job < a.H * panels; ++job) {
        const i64 h = job / panels, c = job % panels * 2 * LANES;
        i64 n = 0;
        for (; n + TOKENS <= N; n += TOKENS) map_query<TOKENS>(a, n, h, c);
        for (; n < N; ++n) map_query<1>(a, n, h, c);
    }
}

void map_values(const Latent& a) {
    const i64 N = a.B * a.T, groups = (a.Dv + 3) / 4;
#pragma omp parallel for schedule(static)
    for (i64 job = 0; job < a.H * groups; ++job) {
        const i64 h = job / groups, d = job % groups * 4;
        i64 n = 0;
        for (; n + TOKENS <= N; n += TOKENS) map_value<TOKENS>(a, n, h, d);
        for (; n < N; ++n) map_value<1>(a, n, h, d);
    }
}

}  // namespace

extern "C" void quintet_latent_bf16(const Latent* latent, float scale) {
    const Latent& a = *latent;
    map_queries(a);
    const Strides whole{a.T * a.H * a.R, a.H * a.R, a.R};
    attend({a.B, a.T, a.S, 1, a.H, a.R, a.Dr, a.R, 0, a.q_latent, a.q_pe, a.c_kv, a.k_pe, a.c_kv, a.mixed,
            whole, a.pe_at, a.c_at, a.k_at, a.c_at, whole, a.start},
           scale);
    map_values(a);
}
