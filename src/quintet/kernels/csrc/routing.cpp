// Routers: how well each expert suits a token, and which ones it goes to.
#include <omp.h>

#include <vector>

#include "simd.h"

namespace {

// Products below which one thread does it all.
constexpr i64 FEW = 1 << 16;

// logits (N, E) = x (N, C) · weight (E, C), summed in float32; a row of the weight is read once.
template <class T>
void logits(const T* x, const T* weight, float* y, i64 N, i64 E, i64 C, i64 x_row, i64 weight_row) {
#pragma omp parallel for if (N * E * C >= FEW) schedule(static)
    for (i64 e = 0; e < E; ++e) {
        const T* w = weight + e * weight_row;
        for (i64 n = 0; n < N; ++n) {
            const T* from = x + n * x_row;
            F total = zero();
            i64 i = 0;
            for (; i + LANES <= C; i += LANES) total = fma(load(from + i), load(w + i), total);
            if (i < C) total = fma(load(from + i, C - i), load(w + i, C - i), total);
            y[n * E + e] = sum(total);
        }
    }
}

struct Rules {
    i64 N, E, A, groups, kept, normalise;
};

// The largest of those that are open, the first one of equals; NaN goes before all, as in torch.
template <class Open>
i64 best(const float* values, i64 n, Open&& open) {
    i64 found = -1;
    for (i64 i = 0; i < n; ++i)
        if (open(i) && (found < 0 || !(values[i] <= values[found]))) {
            if (found >= 0 && values[found] != values[found]) break;
            found = i;
        }
    return found;
}

void choose(const float* logits, const float* bias, const Rules& r, float scaling, i64* indices,
            float* weights) {
    const i64 size = r.E / r.groups;
    std::vector<float> scores(r.E), choice(r.E), totals(r.groups);
    std::vector<char> taken(r.E), open(r.groups);
    for (i64 n = 0; n < r.N; ++n) {
        for (i64 e = 0; e < r.E; ++e) {
            scores[e] = 1.0f / (1.0f + std::exp(-logits[n * r.E + e]));
            choice[e] = scores[e] + bias[e];
        }
        std::fill(taken.begin(), taken.end(), 0);
        std::fill(open.begin(), open.end(), r.kept == r.groups);
        if (r.kept < r.groups) {
            for (i64 g = 0; g < r.groups; ++g) {
                const float* of = choice.data() + g * size;
                const i64 first = best(of, size, [](i64) { return true; });
                const i64 second = best(of, size, [&](i64 i) { return i != first; });
                totals[g] = of[first] + (second < 0 ? 0.0f : of[second]);
            }
            for (i64 k = 0; k < r.kept; ++k)
                open[best(totals.data(), r.groups, [&](i64 g) { return !open[g]; })] = 1;
        }
        float total = 0.0f;
        for (i64 a = 0; a < r.A; ++a) {
            const i64 e = best(choice.data(), r.E, [&](i64 i) { return !taken[i] && open[i / size]; });
            taken[e] = 1;
            indices[n * r.A + a] = e;
            weights[n * r.A + a] = scores[e];
            total += scores[e];
        }
        const float by = r.normalise ? scaling / (total + 1e-20f) : scaling;
        for (i64 a = 0; a < r.A; ++a) weights[n * r.A + a] *= by;
    }
}

}  // namespace

#define QUINTET_ROUTING(name, T)                                                                  \
    extern "C" void quintet_router_logits_##name(const T* x, const T* weight, float* y, i64 N,    \
                                                 i64 E, i64 C, i64 x_row, i64 weight_row) {       \
        logits(x, weight, y, N, E, C, x_row, weight_row);                                         \
    }
QUINTET_ROUTING(bf16, bf16)
QUINTET_ROUTING(f32, float)

extern "C" void quintet_sigmoid_routing(const float* logits, const float* bias, const Rules* rules,
                                        float scaling, i64* indices, float* weights) {
    choose(logits, bias, *rules, scaling, indices, weights);
}
