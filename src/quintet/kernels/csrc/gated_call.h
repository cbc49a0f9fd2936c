// Gated MLPs of few tokens, by a team of their own, as a call.
#pragma once
#include <omp.h>

#include "gated.h"
#include "routing.h"

namespace quintet {

template <class Matrix, class T>
struct GatedCall {
    Experts experts;
    i64 N, A;
    Span<const T> x;  // (N, C)
    Span<T> y;        // the same
    Span<const i64> indices;  // (N, A), null where every token goes to the one expert there is
    Span<const float> shares;

    i64 size() const { return sizeof(GatedCall); }
    bool fits() const {
        return N > 0 && A > 0 && experts.template fits<Matrix>() && x.holds(N * experts.C) &&
               y.holds(N * experts.C) && chooses();
    }

  private:
    bool chooses() const {
        if (!indices.given()) return A == 1 && experts.E == 1;
        return indices.holds(N * A) && shares.holds(N * A) && known(indices, N * A, experts.E);
    }
};

template <class Matrix, class T>
void gated(const GatedCall<Matrix, T>& c) {
    const i64 C = c.experts.C, F = c.experts.F;
    const Plan plan(c.indices, c.shares, c.N, c.A, c.experts.E);
    const i64 P = plan.choices();
    const Inputs<Matrix> of_tokens(c.x.p, c.N, C, C);
    std::vector<T> hidden(size_t(P * F));
    Inputs<Matrix> of_hidden(P, F);
#pragma omp parallel
    {
        const i64 me = omp_get_thread_num(), threads = omp_get_num_threads();
        std::vector<float> made;
        gate_experts(c.experts, plan, of_tokens, me, threads, hidden.data(), made);
#pragma omp barrier
        of_hidden.fill(hidden.data(), P, F, me, threads);
#pragma omp barrier
        const Share mine(C, me, threads);
        const i64 width = mine.to - mine.from;
        std::vector<float> sums(size_t(c.N * width));
        sum_experts(c.experts, plan, c.N, of_hidden, mine.from, mine.to, sums, made);
        for (i64 n = 0; n < c.N; ++n)
            for (i64 i = 0; i < width; ++i)
                narrow(sums[size_t(n * width + i)], c.y + n * C + mine.from + i);
    }
}

}  // namespace quintet

#define QUINTET_GATED(name, Matrix, T)          \
    using Gated_##name = GatedCall<Matrix, T>;  \
    QUINTET_ENTRY(gated_##name, Gated_##name, gated)
