// What becomes of logits before a token is chosen.
#include "simd.h"

// y = x (B, V), but of the ids (B, T) that count, divided by the penalty, or multiplied below zero. An
// id that occurs often is penalised once, as x stays what it is.
extern "C" void quintet_penalise_repetition(const float* x, const int64_t* ids, const uint8_t* kept,
                                            float* y, int64_t B, int64_t V, int64_t T, int64_t ids_row,
                                            float penalty) {
    for (int64_t b = 0; b < B; ++b) {
        const float* from = x + b * V;
        float* to = y + b * V;
        std::memcpy(to, from, size_t(V) * sizeof(float));
        for (int64_t t = 0; t < T; ++t) {
            const int64_t id = ids[b * ids_row + t];
            if (id < 0 || id >= V || (kept && !kept[b * T + t])) continue;
            to[id] = from[id] < 0 ? from[id] * penalty : from[id] / penalty;
        }
    }
}
