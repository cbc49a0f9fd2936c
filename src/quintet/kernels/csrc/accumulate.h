// Products of small matrices of float32 whose parts lie in the caches.
#pragma once
#include "simd.h"

namespace quintet {

// out[i] += Σ_k a[i·ai + k·ak] · m[k], for I rows of V vectors at once.
template <int I, int V>
inline void rows_times(float* out, i64 ldo, const float* a, i64 ai, i64 ak,
                       const float* m, i64 ldm, i64 K) {
    F acc[I][V];
    for (int i = 0; i < I; ++i)
        for (int v = 0; v < V; ++v) acc[i][v] = load(out + i * ldo + LANES * v);
    for (i64 k = 0; k < K; ++k) {
        F row[V];
        for (int v = 0; v < V; ++v) row[v] = load(m + k * ldm + LANES * v);
        for (int i = 0; i < I; ++i) {
            const F x = all(a[i * ai + k * ak]);
            for (int v = 0; v < V; ++v) acc[i][v] = fma(x, row[v], acc[i][v]);
        }
    }
    for (int i = 0; i < I; ++i)
        for (int v = 0; v < V; ++v) store(out + i * ldo + LANES * v, acc[i][v]);
}

template <int V>
inline void columns_times(float* out, i64 ldo, const float* a, i64 ai, i64 ak,
                          const float* m, i64 ldm, i64 M, i64 K) {
    i64 i = 0;
    for (; i + 6 <= M; i += 6) rows_times<6, V>(out + i * ldo, ldo, a + i * ai, ai, ak, m, ldm, K);
    for (; i + 2 <= M; i += 2) rows_times<2, V>(out + i * ldo, ldo, a + i * ai, ai, ak, m, ldm, K);
    for (; i < M; ++i) rows_times<1, V>(out + i * ldo, ldo, a + i * ai, ai, ak, m, ldm, K);
}

// out (M, P) += a (M, K) · m (K, P); a is read with any strides, P is a multiple of LANES.
inline void accumulate(float* out, i64 ldo, const float* a, i64 ai, i64 ak,
                       const float* m, i64 ldm, i64 M, i64 K, i64 P) {
    for (i64 p = 0; p < P;) {
        const i64 left = (P - p) / LANES;
        if (left >= 4) columns_times<4>(out + p, ldo, a, ai, ak, m + p, ldm, M, K), p += 4 * LANES;
        else if (left >= 2) columns_times<2>(out + p, ldo, a, ai, ak, m + p, ldm, M, K), p += 2 * LANES;
        else columns_times<1>(out + p, ldo, a, ai, ak, m + p, ldm, M, K), p += LANES;
    }
}

}  // namespace quintet
