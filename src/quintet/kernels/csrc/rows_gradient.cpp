// The gradients of what is done row by row between the products, from what went in.
#include <omp.h>

#include <memory>

#include "rows.h"
#include "span.h"

using namespace quintet;

namespace {

template <class T>
struct NormBack {
    i64 rows, C;
    double eps;
    Span<const T> x, weight, grad;  // (rows, C), (C), (rows, C)
    Span<T> for_x;                  // (rows, C)
    Span<float> for_weight;         // (C)

    i64 size() const { return sizeof(NormBack); }
    bool fits() const {
        const i64 n = rows * C;
        return rows >= 0 && C > 0 && x.holds(n) && weight.holds(C) && grad.holds(n) && for_x.holds(n) &&
               for_weight.holds(C);
    }
};

// With u = x·r and r the root: dw = Σ g·u, dx = r·(g·w - u·mean(g·w·u)).
template <class T>
void norm_back(const NormBack<T>& c) {
    const i64 C = c.C, threads = omp_get_max_threads();
    const std::unique_ptr<float[]> sums(new float[size_t(threads * C)]());
#pragma omp parallel num_threads(int(threads))
    {
        float* own = sums.get() + omp_get_thread_num() * C;
        const Share part(c.rows, omp_get_thread_num(), omp_get_num_threads());
        for (i64 r = part.from; r < part.to; ++r) {
            const T *x = c.x + r * C, *g = c.grad + r * C;
            T* to = c.for_x + r * C;
            F squares = zero(), along = zero();
            each_vector<T>(C, [&](i64 i, auto last) {
                const F v = get(x, i, C, last);
                squares = fma(v, v, squares);
                along = fma(v, mul(get(g, i, C, last), get(c.weight.p, i, C, last)), along);
            });
            const float root = 1.0f / std::sqrt(sum(squares) / float(C) + float(c.eps));
            const F by = all(root), back = all(root * root * sum(along) / float(C));
            each_vector<T>(C, [&](i64 i, auto last) {
                const F v = get(x, i, C, last), here = get(g, i, C, last);
                set(own, i, C, fma(here, mul(v, by), get(own, i, C, last)), last);
                set(to, i, C, mul(by, sub(mul(here, get(c.weight.p, i, C, last)), mul(v, back))), last);
            });
        }
    }
    std::fill_n(c.for_weight.p, C, 0.0f);
    for (i64 k = 0; k < threads; ++k)
        for (i64 i = 0; i < C; ++i) c.for_weight[i] += sums[k * C + i];
}

template <class T>
struct GateBack {
    i64 rows, width;
    Span<const T> gate, up, grad;  // (rows, width)
    Span<T> for_gate, for_up;

    i64 size() const { return sizeof(GateBack); }
    bool fits() const {
        const i64 n = rows * width;
        return rows >= 0 && width > 0 && gate.holds(n) && up.holds(n) && grad.holds(n) && for_gate.holds(n) &&
               for_up.holds(n);
    }
};

template <class T>
void silu_back(const GateBack<T>& c) {
    const i64 width = c.width;
#pragma omp parallel for schedule(static)
    for (i64 r = 0; r < c.rows; ++r) {
        const T *g = c.gate + r * width, *u = c.up + r * width, *d = c.grad + r * width;
        T *for_g = c.for_gate + r * width, *for_u = c.for_up + r * width;
        each_vector<T>(width, [&](i64 i, auto last) {
            const F x = get(g, i, width, last), here = get(d, i, width, last);
            const F s = div(all(1.0f), add(all(1.0f), exp_of(sub(zero(), x))));
            const F slope = mul(s, fma(x, sub(all(1.0f), s), all(1.0f)));
            set(for_u, i, width, mul(here, mul(x, s)), last);
            set(for_g, i, width, mul(mul(here, get(u, i, width, last)), slope), last);
        });
    }
}

}  // namespace

QUINTET_ENTRY(rms_norm_back_bf16, NormBack<bf16>, norm_back)
QUINTET_ENTRY(rms_norm_back_f32, NormBack<float>, norm_back)
QUINTET_ENTRY(silu_back_bf16, GateBack<bf16>, silu_back)
QUINTET_ENTRY(silu_back_f32, GateBack<float>, silu_back)
