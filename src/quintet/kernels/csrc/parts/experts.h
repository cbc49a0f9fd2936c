// Experts that each token chooses some of, and one that all tokens go through.
#pragma once
#include "../gated.h"
#include "../routing.h"
#include "part.h"

namespace quintet {

template <class Matrix, class T>
class ExpertsPart {
  public:
    struct Fields {
        QUINTET_FIELDS(norm, router, wide, rules, experts, gate, up, down, F, share)
        Norm norm;
        Span<const T> router;  // (E, C)
        i64 wide;         // whether logits stay float32; otherwise they are rounded
        Rules rules;
        Experts experts;
        Weight gate, up, down;  // of the shared expert
        i64 F;                  // its width, 0 where there is none
        Span<const T> share;    // (C), of which the sigmoid is the shared expert's share, or null
    };
    using Held = void;

    static bool fits(const Fields& f, const Held*, const Tokens& s) {
        const i64 C = s.C;
        const bool shared = f.gate.O == f.F && f.up.O == f.F && f.down.O == C && f.F > 0 &&
                            f.gate.template fits<Matrix, T>(C) && f.up.template fits<Matrix, T>(C) &&
                            f.down.template fits<Matrix, T>(f.F);
        return f.norm.width(C) == C && f.norm.template fits<T>(C) && f.rules.fits() && f.rules.E == f.experts.E &&
               f.router.holds(f.rules.E * C) && f.experts.C == C && f.experts.template fits<Matrix>() &&
               (f.F == 0 || shared) && (!f.share.given() || f.share.holds(C));
    }

    ExpertsPart(const Fields& f, const Held*, const Tokens& s, i64, Room& room)
        : f_(f), s_(s),
          logits_(room.take<float>(s.all() * f.rules.E)),
          rounded_(room.take<T>(s.all() * f.rules.E)),
          shared_(room.take<T>(s.all() * f.F)),
          added_(room.take<T>(s.all() * s.C)),
          hidden_(room.take<T>(s.all() * f.rules.A * f.experts.F)) {}

    void run(Member<Matrix, T>& me) {
        const i64 N = s_.all(), C = s_.C;
        const Normed<Matrix, T> normed(me, f_.norm);
        score(me, normed.rows.data());
        const Share mine = me.share(f_.F);
        if (mine.from < mine.to)
            gate_rows(matrix_of<Matrix, T>(f_.gate, C), matrix_of<Matrix, T>(f_.up, C),
                      normed.inputs.of.data(), N, mine.from, mine.to, shared_, f_.F, me.made);
        const std::vector<float> shares = shares_of_shared(normed.rows.data());
#pragma omp barrier
        // Each thread for itself: to wait for one takes as long.
        std::vector<float> weights(size_t(N * f_.rules.A));
        const Plan plan = chosen(weights);
        gate_experts(f_.experts, plan, normed.inputs, me.thread, me.threads, hidden_, me.made);
#pragma omp barrier
        add(me, plan, shares);
#pragma omp barrier
    }

  private:
    void score(const Member<Matrix, T>& me, const T* x) const {
        const i64 N = s_.all(), C = s_.C, E = f_.rules.E;
        const Share mine = me.share(E);
        if (f_.wide) return Logits<T>{x, f_.router, logits_, N, E, C, C, C}.run(mine.from, mine.to);
        if (mine.from == mine.to) return;
        const Inputs<Plain<T>> inputs(x, N, C, C);
        std::vector<float> made(size_t(N * (mine.to - mine.from)));
        Plain<T>{f_.router, C, C}.rows(inputs.of.data(), N, mine.from, mine.to,
                                       {made.data(), mine.to - mine.from, mine.from});
        for (i64 n = 0; n < N; ++n)
            for (i64 e = mine.from; e < mine.to; ++e)
                narrow(made[size_t(n * (mine.to - mine.from) + e - mine.from)], rounded_ + n * E + e);
    }

    // (N), of which the modules round every step.
    std::vector<float> shares_of_shared(const T* x) const {
        const i64 N = s_.all();
        std::vector<float> shares(size_t(N), 1.0f);
        if (!f_.share) return shares;
        const Inputs<Plain<T>> inputs(x, N, s_.C, s_.C);
        Plain<T>{f_.share, s_.C, s_.C}.rows(inputs.of.data(), N, 0, 1, {shares.data(), 1, 0});
        for (float& share : shares) share = rounded<T>(1.0f / (1.0f + std::exp(-rounded<T>(share))));
        return shares;
    }

    Plan chosen(std::vector<float>& weights) const {
        const i64 N = s_.all(), E = f_.rules.E, A = f_.rules.A;
        std::vector<i64> indices(size_t(N * A));
        Router router(f_.rules);
        for (i64 n = 0; n < N; ++n) {
            i64* to = indices.data() + n * A;
            if (f_.wide) router.choose(logits_ + n * E, to, weights.data() + n * A);
            else router.choose(rounded_ + n * E, to, weights.data() + n * A);
        }
        return Plan(indices.data(), weights.data(), N, A, E);
    }

    // x += the experts and the shared one, of the columns that are this thread's.
    void add(Member<Matrix, T>& me, const Plan& plan, const std::vector<float>& shares) const {
        const i64 N = s_.all(), P = plan.choices();
        const Share mine = me.share(s_.C);
        const i64 width = mine.to - mine.from;
        std::vector<float> routed(size_t(N * width)), shared(size_t(N * width));
        if (width)
            sum_experts(f_.experts, plan, N, taken_in<Matrix>(hidden_, P, f_.experts.F), mine.from, mine.to,
                        routed, me.made);
        if (f_.F && width)
            matrix_of<Matrix, T>(f_.down, f_.F)
                .rows(taken_in<Matrix>(shared_, N, f_.F).of.data(), N, mine.from, mine.to,
                      {shared.data(), width, mine.from});
        for (i64 n = 0; n < N; ++n) {
            T* y = added_ + n * s_.C + mine.from;
            for (i64 i = 0; i < width; ++i) {
                const float beside = rounded<T>(shared[size_t(n * width + i)]);
                narrow(routed[size_t(n * width + i)], y + i);
                if (f_.F) narrow(widen(y[i]) + rounded<T>(shares[size_t(n)] * beside), y + i);
            }
        }
        me.meet(added_, s_.C);
        me.add(added_, me.x(), s_.C);
    }

    const Fields& f_;
    const Tokens& s_;
    float* const logits_;
    T *const rounded_, *const shared_, *const added_, *const hidden_;
};

}  // namespace quintet
