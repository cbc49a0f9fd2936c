// Gated MLPs, one or many experts, of few tokens: y = Σ_e share_e · down_e (silu(gate_e x) · up_e x).
#include <omp.h>

#include "gated.h"

namespace {

// One matrix an expert, `step` bytes from one to the next; eight-byte fields, as Python fills them.
struct Stack {
    const char* w;
    const char* scale;
    i64 w_step;
    i64 scale_step;
    i64 stride;
};

struct Call {
    Stack gate, up, down;
    const void* x;
    void* y;
    const i64* indices;  // (N, A), null where every token goes to the one expert there is
    const float* shares;
    i64 N, A, E, C, F;
};

template <class T>
void open(const Stack& s, i64 e, i64 I, Plain<T>* to) {
    *to = {reinterpret_cast<const T*>(s.w + e * s.w_step), I, s.stride};
}
void open(const Stack& s, i64 e, i64 I, Int8* to) {
    *to = {reinterpret_cast<const int8_t*>(s.w + e * s.w_step),
           reinterpret_cast<const float*>(s.scale + e * s.scale_step), I};
}
void open(const Stack& s, i64 e, i64 I, Int4* to) {
    *to = {reinterpret_cast<const uint8_t*>(s.w + e * s.w_step),
           reinterpret_cast<const bf16*>(s.scale + e * s.scale_step), I};
}
template <class Matrix>
Matrix matrix(const Stack& s, i64 e, i64 I) {
    Matrix m;
    open(s, e, I, &m);
    return m;
}

// The choices of all tokens, sorted by expert: of expert `expert`, [from, to).
struct Run {
    i64 expert, from, to;
};

struct Plan {
    std::vector<Run> runs;
    std::vector<i64> tokens;
    std::vector<float> shares;

    explicit Plan(const Call& c) : tokens(size_t(c.N * c.A)), shares(size_t(c.N * c.A)) {
        std::vector<i64> counts(size_t(c.E) + 1);
        auto expert = [&](i64 i) { return size_t(c.indices ? c.indices[i] : 0); };
        for (i64 i = 0; i < c.N * c.A; ++i) ++counts[expert(i) + 1];
        for (i64 e = 0; e < c.E; ++e) {
            const i64 n = counts[size_t(e) + 1], from = counts[size_t(e)];
            if (n) runs.push_back({e, from, from + n});
            counts[size_t(e) + 1] += from;
        }
        for (i64 i = 0; i < c.N * c.A; ++i) {
            const size_t at = size_t(counts[expert(i)]++);
            tokens[at] = i / c.A;
            shares[at] = c.shares ? c.shares[i] : 1.0f;
        }
    }
};

template <class Matrix, class T>
void gated(const Call& c) {
    const Plan plan(c);
    const i64 P = c.N * c.A, runs = i64(plan.runs.size());
    T* y = static_cast<T*>(c.y);
    const Inputs<Matrix> of_tokens(static_cast<const T*>(c.x), c.N, c.C, c.C);
    std::vector<typename Matrix::Input> chosen(static_cast<size_t>(P));
    for (i64 p = 0; p < P; ++p) chosen[size_t(p)] = of_tokens.of[size_t(plan.tokens[size_t(p)])];
    std::vector<T> hidden(size_t(P * c.F));
    Inputs<Matrix> of_hidden(P, c.F);
#pragma omp parallel
    {
        const i64 me = omp_get_thread_num(), threads = omp_get_num_threads();
        std::vector<float> made;
        const Share rows(runs * c.F, me, threads);
        for (i64 at = rows.from; at < rows.to;) {
            const Run& run = plan.runs[size_t(at / c.F)];
            const i64 from = at % c.F, to = std::min(c.F, from + rows.to - at), n = run.to - run.from;
            gate_rows(matrix<Matrix>(c.gate, run.expert, c.C), matrix<Matrix>(c.up, run.expert, c.C),
                      chosen.data() + run.from, n, from, to, hidden.data() + run.from * c.F, c.F, made);
            at += to - from;
        }
#pragma omp barrier
        of_hidden.fill(hidden.data(), P, c.F, me, threads);
#pragma omp barrier
        const Share mine(c.C, me, threads);
        const i64 width = mine.to - mine.from;
        made.resize(size_t(P * width));
        for (const Run& run : plan.runs)
            matrix<Matrix>(c.down, run.expert, c.F)
                .rows(of_hidden.of.data() + run.from, run.to - run.from, mine.from, mine.to,
                      {made.data() + run.from * width, width, mine.from});
        std::vector<float> sums(size_t(c.N * width));
        for (i64 p = 0; p < P; ++p) {
            float* to = sums.data() + plan.tokens[size_t(p)] * width;
            const float share = plan.shares[size_t(p)];
            for (i64 i = 0; i < width; ++i) to[i] += share * made[size_t(p * width + i)];
        }
        for (i64 n = 0; n < c.N; ++n)
            for (i64 i = 0; i < width; ++i)
                narrow(sums[size_t(n * width + i)], y + n * c.C + mine.from + i);
    }
}

}  // namespace

#define QUINTET_GATED(name, Matrix, T) \
    extern "C" void quintet_gated_##name(const Call* call) { gated<Matrix, T>(*call); }
QUINTET_GATED(bf16, Plain<bf16>, bf16)
QUINTET_GATED(f32, Plain<float>, float)
QUINTET_GATED(int8_bf16, Int8, bf16)
QUINTET_GATED(int8_f32, Int8, float)
QUINTET_GATED(int4_bf16, Int4, bf16)
QUINTET_GATED(int4_f32, Int4, float)
