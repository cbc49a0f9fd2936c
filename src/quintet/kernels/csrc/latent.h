// Latent attention in the space of the latents (arXiv:2405.04434, §2.1.2): queries are mapped there
// by W_UK, all heads share the latents as one key and one value, and W_UV maps what comes out.
#pragma once
#include "attention.h"

namespace quintet {

// w (H, Dn + Dv, R) is whole; q_latent and mixed, each (B, T, H, R), are room to compute in; out is
// (B, T, H, Dv). Sequences begin `apart` tokens from one `first` to the next.
struct Latent {
    i64 B, T, S, H, Dn, Dr, Dv, R, apart;
    const bf16 *q_nope, *q_pe, *c_kv, *k_pe, *w;
    bf16 *q_latent, *mixed, *out;
    Strides nope_at, pe_at, c_at, k_at;
    Sequences sequences;

    // All heads attend to the latents, which are keys and values.
    Attention attention() const {
        const Strides whole{apart * H * R, R, H * R};
        return {S, 1, H, R, Dr, R, 0, q_latent, q_pe, c_kv, k_pe, c_kv, mixed,
                whole, pe_at, c_at, k_at, c_at, whole, sequences};
    }
};

constexpr int TOKENS = 4;  // whose sums are in registers at once

// q_latent = W_UKᵀ q_nope: lanes are columns of W, whose rows are taken in pairs; P panels of 2 LANES
// columns from c, so that memory is read in long pieces, the next rows fetched meanwhile.
template <int N, int P>
void map_query(const Latent& a, i64 n0, i64 h, i64 c) {
    constexpr i64 AHEAD = 8;
    const bf16* w = a.w + h * (a.Dn + a.Dv) * a.R + c;
    const bf16* q[N];
    F acc[N][P][2];
    for (int i = 0; i < N; ++i) {
        const i64 b = (n0 + i) / a.T, t = (n0 + i) % a.T;
        q[i] = a.q_nope + b * a.nope_at.row + t * a.nope_at.token + h * a.nope_at.head;
        for (int p = 0; p < P; ++p) acc[i][p][0] = acc[i][p][1] = zero();
    }
    for (i64 d = 0; d < a.Dn; d += 2) {
        const bf16* row = w + d * a.R;
        for (int p = 0; p < P; ++p) {
            prefetch<_MM_HINT_T0>(row + AHEAD * a.R + p * 2 * LANES, 0);
            prefetch<_MM_HINT_T0>(row + (AHEAD + 1) * a.R + p * 2 * LANES, 0);
            Pairs low, high;
            zip(load_pairs(row + p * 2 * LANES), load_pairs(row + a.R + p * 2 * LANES), &low, &high);
            for (int i = 0; i < N; ++i) {
                const Pairs pair = same_pair(q[i] + d);
                acc[i][p][0] = dot(acc[i][p][0], low, pair);
                acc[i][p][1] = dot(acc[i][p][1], high, pair);
            }
        }
    }
    for (int i = 0; i < N; ++i)
        for (int p = 0; p < P; ++p) {
            bf16* to = a.q_latent + ((n0 + i) * a.H + h) * a.R + c + p * 2 * LANES;
            F first, second;
            columns(acc[i][p][0], acc[i][p][1], &first, &second);
            store(to, first);
            store(to + LANES, second);
        }
}

template <int P>
void map_query_tokens(const Latent& a, i64 h, i64 c) {
    constexpr int N = LANES == 16 && P <= 2 ? TOKENS : 1;
    const i64 count = a.B * a.T;
    i64 n = 0;
    for (; n + N <= count; n += N) map_query<N, P>(a, n, h, c);
    for (; n < count; ++n) map_query<1, P>(a, n, h, c);
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
        for (int r = 0; r < 4; ++r) {
            rows[r] = load_pairs(w + std::min<i64>(r, last) * a.R + c);
            // The next four rows, in the order in which memory has them.
            prefetch<_MM_HINT_T0>(w + 4 * a.R + 4 * c + r * 2 * LANES, 0);
        }
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

// One token takes the columns of a head in halves, several take them in pieces that leave room for
// all their sums. Every thread of a running team calls it, as it does what follows.
inline void map_queries(const Latent& a) {
    constexpr i64 WIDE = LANES == 16 ? 8 : 4;
    const i64 panels = a.R / (2 * LANES), most = a.B * a.T < TOKENS ? WIDE : 2;
    const i64 pieces = (panels + most - 1) / most;
#pragma omp for schedule(static)
    for (i64 job = 0; job < a.H * pieces; ++job) {
        const i64 h = job / pieces, first = job % pieces * most;
        const i64 end = std::min(panels, first + most);
        i64 p = first;
        for (; p + WIDE <= end; p += WIDE) map_query_tokens<WIDE>(a, h, p * 2 * LANES);
        for (; p + 2 <= end; p += 2) map_query_tokens<2>(a, h, p * 2 * LANES);
        for (; p < end; ++p) map_query_tokens<1>(a, h, p * 2 * LANES);
    }
}

inline void map_values(const Latent& a) {
    const i64 N = a.B * a.T, groups = (a.Dv + 3) / 4;
#pragma omp for schedule(static)
    for (i64 job = 0; job < a.H * groups; ++job) {
        const i64 h = job / groups, d = job % groups * 4;
        i64 n = 0;
        for (; LANES == 16 && n + TOKENS <= N; n += TOKENS) map_value<TOKENS>(a, n, h, d);
        for (; n < N; ++n) map_value<1>(a, n, h, d);
    }
}

// As `attend` of the latents' attention, whose division it takes.
inline void attend(const Latent& a, float scale, const Division& division, float* memory) {
    map_queries(a);
    attend(a.attention(), scale, division, memory);
    map_values(a);
}

}  // namespace quintet
