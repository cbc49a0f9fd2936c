// Routers by themselves.
#include <omp.h>

#include "routing.h"

using namespace quintet;

namespace {

// Products below which one thread does it all.
constexpr i64 FEW = 1 << 16;

template <class T>
struct LogitsCall {
    i64 N, E, C;
    Span<const T> x;  // (N, C)
    i64 x_row;
    Span<const T> weight;  // (E, C)
    i64 weight_row;
    Span<float> y;  // (N, E)

    i64 size() const { return sizeof(LogitsCall); }
    bool fits() const {
        return x.holds({{N, x_row}, {C, 1}}) && weight.holds({{E, weight_row}, {C, 1}}) && y.holds(N * E);
    }
};

template <class T>
void logits(const LogitsCall<T>& c) {
    const Logits<T> of{c.x, c.weight, c.y, c.N, c.E, c.C, c.x_row, c.weight_row};
#pragma omp parallel if (of.N * of.E * of.C >= FEW)
    {
        const Share mine(of.E, omp_get_thread_num(), omp_get_num_threads());
        of.run(mine.from, mine.to);
    }
}

template <class T>
struct ChoiceCall {
    Rules rules;
    i64 N;
    Span<const T> logits;  // (N, E)
    Span<i64> indices;     // (N, A)
    Span<float> weights;   // the same

    i64 size() const { return sizeof(ChoiceCall); }
    bool fits() const {
        return N > 0 && rules.fits() && logits.holds(N * rules.E) && indices.holds(N * rules.A) &&
               weights.holds(N * rules.A);
    }
};

template <class T>
void choose(const ChoiceCall<T>& c) {
    const i64 E = c.rules.E, A = c.rules.A;
#pragma omp parallel if (c.N * E >= FEW)
    {
        Router router(c.rules);
#pragma omp for schedule(static)
        for (i64 n = 0; n < c.N; ++n) router.choose(c.logits + n * E, c.indices + n * A, c.weights + n * A);
    }
}

}  // namespace

QUINTET_ENTRY(router_logits_bf16, LogitsCall<bf16>, logits)
QUINTET_ENTRY(router_logits_f32, LogitsCall<float>, logits)
QUINTET_ENTRY(choose_bf16, ChoiceCall<bf16>, choose)
QUINTET_ENTRY(choose_f32, ChoiceCall<float>, choose)
