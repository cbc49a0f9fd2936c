// Gated MLPs, one or many experts: y = Σ_e share_e · down_e (silu(gate_e x) · up_e x).
#pragma once
#include "groups.h"
#include "rows.h"

namespace quintet {

// Numbers [from, to) of silu(gate x) · up x for n vectors, each `row` from the one before; `made` is
// room to work in.
template <class Matrix, class T>
void gate_rows(const Matrix& gate, const Matrix& up, const typename Matrix::Input* x, i64 n, i64 from,
               i64 to, T* hidden, i64 row, std::vector<float>& made) {
    const i64 width = to - from;
    made.resize(size_t(2 * n * width));
    gate.rows(x, n, from, to, {made.data(), width, from});
    up.rows(x, n, from, to, {made.data() + n * width, width, from});
    for (i64 m = 0; m < n; ++m) {
        const float *g = made.data() + m * width, *u = g + n * width;
        T* h = hidden + m * row + from;
        i64 i = 0;
        for (; i + LANES <= width; i += LANES) store(h + i, mul(silu(load(g + i)), load(u + i)));
        if (i < width) store(h + i, mul(silu(load(g + i, width - i)), load(u + i, width - i)), width - i);
    }
}

// One matrix an expert; steps in what a matrix is made of, from one to the next and from row to row.
struct Stacked {
    QUINTET_FIELDS(w, w_step, stride, scale, scale_step, offset, offset_step)
    Span<const void> w;
    i64 w_step, stride;
    Span<const void> scale;
    i64 scale_step;
    Span<const void> offset;
    i64 offset_step;

    template <class Matrix>
    const typename Matrix::Stored* weight_of(i64 e) const {
        return w.as<typename Matrix::Stored>() + e * w_step;
    }
    template <class Matrix>
    const typename Matrix::Scale* scale_of(i64 e) const {
        return scale.as<typename Matrix::Scale>() + e * scale_step;
    }
    template <class Matrix>
    bool fits(i64 E, i64 O, i64 I) const {
        const Bytes one = Matrix::bytes(O, I, stride);
        if (w_step < 0 || scale_step < 0 || offset_step < 0 || one.weight <= 0) return false;
        const i64 weights = (E - 1) * w_step * i64(sizeof(typename Matrix::Stored));
        const i64 scales = (E - 1) * scale_step * i64(sizeof(typename Matrix::Scale));
        return Bytes{weights + one.weight, one.scale ? scales + one.scale : 0}.within(w, scale) &&
               (!offset.given() || offset.as<char>().holds((E - 1) * offset_step + one.scale));
    }
};

struct Experts {
    QUINTET_FIELDS(gate, up, down, E, C, F)
    Stacked gate, up, down;
    i64 E, C, F;

    template <class Matrix>
    bool fits() const {
        return E > 0 && C > 0 && F > 0 && gate.fits<Matrix>(E, F, C) && up.fits<Matrix>(E, F, C) &&
               down.fits<Matrix>(E, C, F);
    }
};

template <class T>
void open(const Stacked& s, i64 e, i64 I, Plain<T>* to) {
    *to = {s.weight_of<Plain<T>>(e), I, s.stride};
}
template <class Integers>
void open(const Stacked& s, i64 e, i64 I, Integers* to) {
    *to = {s.weight_of<Integers>(e), s.scale_of<Integers>(e), I};
}
inline void open(const Stacked& s, i64 e, i64 I, Groups* to) {
    const char* offset = s.offset.as<char>();
    *to = {s.weight_of<Groups>(e), s.scale_of<Groups>(e), offset ? offset + e * s.offset_step : nullptr, I, Layout(s.stride)};
}
template <class Matrix>
Matrix expert(const Stacked& s, i64 e, i64 I) {
    Matrix m{};
    open(s, e, I, &m);
    return m;
}

// The choices of all tokens, sorted by expert: of expert `expert`, [from, to).
struct Chosen {
    i64 expert, from, to;
};

struct Plan {
    std::vector<Chosen> experts;
    std::vector<i64> tokens;
    std::vector<i64> places;  // (N, A) where a choice went
    const float* shares;      // (N, A), null where every token goes to the one expert there is

    // Of indices and shares (N, A).
    Plan(const i64* indices, const float* shares, i64 N, i64 A, i64 E)
        : tokens(size_t(N * A)), places(size_t(N * A)), shares(shares) {
        std::vector<i64> counts(size_t(E) + 1);
        auto expert = [&](i64 i) { return size_t(indices ? indices[i] : 0); };
        for (i64 i = 0; i < N * A; ++i) ++counts[expert(i) + 1];
        for (i64 e = 0; e < E; ++e) {
            const i64 n = counts[size_t(e) + 1], from = counts[size_t(e)];
            if (n) experts.push_back({e, from, from + n});
            counts[size_t(e) + 1] += from;
        }
        for (i64 i = 0; i < N * A; ++i) {
            places[size_t(i)] = counts[expert(i)]++;
            tokens[size_t(places[size_t(i)])] = i / A;
        }
    }
    i64 choices() const { return i64(tokens.size()); }
};

// The part of silu(gate x) · up x of all choices that is a thread's: hidden is (choices, F).
template <class Matrix, class T>
void gate_experts(const Experts& of, const Plan& plan, const Inputs<Matrix>& of_tokens, i64 thread,
                  i64 threads, T* hidden, std::vector<float>& made) {
    std::vector<typename Matrix::Input> x(plan.tokens.size());
    for (size_t p = 0; p < x.size(); ++p) x[p] = of_tokens.of[size_t(plan.tokens[p])];
    const Share rows(i64(plan.experts.size()) * of.F, thread, threads);
    for (i64 at = rows.from; at < rows.to;) {
        const Chosen& run = plan.experts[size_t(at / of.F)];
        const i64 from = at % of.F, to = std::min(of.F, from + rows.to - at), n = run.to - run.from;
        gate_rows(expert<Matrix>(of.gate, run.expert, of.C), expert<Matrix>(of.up, run.expert, of.C),
                  x.data() + run.from, n, from, to, hidden + run.from * of.F, of.F, made);
        at += to - from;
    }
}

// Σ share · down h of N tokens, of the columns [from, to), in the order in which a token chose its
// experts: sums (N, to - from).
template <class Matrix>
void sum_experts(const Experts& of, const Plan& plan, i64 N, const Inputs<Matrix>& of_hidden, i64 from, i64 to,
                 std::vector<float>& sums, std::vector<float>& made) {
    const i64 width = to - from, A = plan.choices() / N;
    made.resize(size_t(plan.choices() * width));
    for (const Chosen& run : plan.experts)
        expert<Matrix>(of.down, run.expert, of.F)
            .rows(of_hidden.of.data() + run.from, run.to - run.from, from, to,
                  {made.data() + run.from * width, width, from});
    for (i64 n = 0; n < N; ++n)
        each_vector<float>(width, [&](i64 i, auto last) {
            F y = zero();
            for (i64 a = n * A; a < (n + 1) * A; ++a) {
                const F one = get(made.data() + plan.places[size_t(a)] * width, i, width, last);
                y = fma(all(plan.shares ? plan.shares[a] : 1.0f), one, y);
            }
            set(sums.data() + n * width, i, width, y, last);
        });
}

}  // namespace quintet
