// The gradient of Mamba-2's mixer: everything between its projections is computed again from what
// went in, so that nothing but that is kept of a forward.
//
// Letters as in quintet/ops/ssd.py. States are walked token by token: forward once for what they give
// out, leaving one behind every SPAN tokens; then span by span from the last, each walked again to
// have its states at hand, and backward. With u = dt·x, S_t = e·S_{t-1} + u ⊗ b and y_t = S_t·c:
//
//     dS_t += dy ⊗ c;  dc = dyᵀ·S_t;  du = dS_t·b;  db = uᵀ·dS_t;  de = <dS_t, S_{t-1}>;  dS_{t-1} = e·dS_t
#pragma once
#include <memory>

#include "ssm.h"

namespace quintet {

constexpr i64 SPAN = 32;

using Floats = std::unique_ptr<float[]>;
inline Floats floats(i64 n) { return Floats(new float[size_t(n)]); }
inline Floats zeros(i64 n) { return Floats(new float[size_t(n)]()); }

inline float dot(const float* a, const float* b, i64 n) {
    F all = zero();
    for (i64 i = 0; i < n; i += LANES) all = fma(load(a + i), load(b + i), all);
    return sum(all);
}
inline void add_to(float* to, const float* x, i64 n) {
    for (i64 i = 0; i < n; ++i) to[i] += x[i];
}
inline F sigmoid_of(F x) { return div(all(1.0f), add(all(1.0f), exp_of(sub(zero(), x)))); }
// d silu(x) / dx.
inline F silu_slope(F x) {
    const F s = sigmoid_of(x);
    return mul(s, fma(x, sub(all(1.0f), s), all(1.0f)));
}

// y = S·c of S = e·S + u ⊗ b, and S into `to`, which may be S itself.
inline void walk(const float* S, float* to, const float* b, const float* c, const float* u, float e,
                 float* y, i64 P, i64 N) {
    for (i64 p = 0; p < P; ++p) {
        F seen = zero();
        for (i64 n = 0; n < N; n += LANES) {
            const F v = fma(load(b + n), all(u[p]), mul(load(S + p * N + n), all(e)));
            store(to + p * N + n, v);
            if (y) seen = fma(v, load(c + n), seen);
        }
        if (y) y[p] = sum(seen);
    }
}

struct Gradient {
    Mixer<float> of;     // `y` is what the states give out, without D
    const float* given;  // (M, inner), of what the mixer returned
    float* in;           // (M, row)
    float *taps, *bias;  // (conv, W), (conv)
    float *dt_bias, *a_log, *d, *weight;
    float *states, *mixed, *by_thread, *scalars, *weights;  // `kept`, (M, conv), threads of each

    i64 spans(const Sequence& s) const { return (s.length + SPAN - 1) / SPAN; }
    const float* row(i64 t) const { return of.mixed + t * of.s.conv(); }

    // u and e of a token.
    float taken(i64 t, i64 h, float* u) const {
        const float step = of.dt[t * of.s.H + h], *x = row(t) + h * of.s.P;
        for (i64 p = 0; p < of.s.P; ++p) u[p] = step * x[p];
        return std::exp(-step * std::exp(of.a_log[h]));
    }

    // Forward: what states give out, and the one before each span.
    void walk_along(const Sequence& s, i64 first_span, i64 h) const {
        const Shape& z = of.s;
        const i64 size = z.P * z.N, group = h / (z.H / z.G);
        std::vector<float> S(size), u(z.P);
        for (i64 i = 0; i < s.length; ++i) {
            const i64 t = s.first + i;
            if (i % SPAN == 0) std::copy_n(S.data(), size, states + ((first_span + i / SPAN) * z.H + h) * size);
            const float* b = row(t) + z.inner() + group * z.N;
            const float e = taken(t, h, u.data());
            walk(S.data(), S.data(), b, b + z.G * z.N, u.data(), e, of.y + t * z.inner() + h * z.P, z.P, z.N);
        }
    }

    // The gated norm of a row: what it was given goes into `y`, and z's share into `in`.
    void unnormalise(i64 r, float* weights) const {
        const Shape& s = of.s;
        const i64 width = s.inner() / s.G;
        for (i64 g = 0; g < s.G; ++g) {
            const i64 at = r * s.inner() + g * width;
            float* y = of.y + at;
            const float *z = of.in + r * s.row() + g * width, *w = of.weight + g * width;
            float* dz = in + r * s.row() + g * width;
            F squares = zero(), along = zero();
            for (i64 i = 0; i < width; i += LANES) {
                const F x = load(row(r) + g * width + i);
                const F out = fma(x, all(of.d[(g * width + i) / s.P]), load(y + i));
                const F v = mul(out, silu(load(z + i)));
                squares = fma(v, v, squares);
                along = fma(v, mul(load(given + at + i), load(w + i)), along);
            }
            const float scale = 1.0f / std::sqrt(sum(squares) / width + of.numbers[2]);
            const F by = all(scale), back = all(scale * scale * sum(along) / width);
            for (i64 i = 0; i < width; i += LANES) {
                const F x = load(row(r) + g * width + i), gate = load(z + i);
                const F out = fma(x, all(of.d[(g * width + i) / s.P]), load(y + i));
                const F v = mul(out, silu(gate)), here = load(given + at + i);
                store(weights + g * width + i, fma(here, mul(v, by), load(weights + g * width + i)));
                const F dv = mul(by, sub(mul(here, load(w + i)), mul(v, back)));
                store(dz + i, mul(mul(dv, out), silu_slope(gate)));
                store(y + i, mul(dv, silu(gate)));
            }
        }
    }

    // Backward through a sequence's states of one head; `bc` (M, 2·G·N) is the thread's own.
    void walk_back(const Sequence& s, i64 first_span, i64 h, float* bc, float* scalars) const {
        const Shape& z = of.s;
        const i64 size = z.P * z.N, group = h / (z.H / z.G), wide = 2 * z.G * z.N;
        const float A = -std::exp(of.a_log[h]);
        std::vector<float> kept((SPAN + 1) * size), dS(size), u(z.P), du(z.P);
        double for_a = 0.0, for_d = 0.0;
        for (i64 k = spans(s) - 1; k >= 0; --k) {
            const i64 from = k * SPAN, L = std::min(SPAN, s.length - from);
            std::copy_n(states + ((first_span + k) * z.H + h) * size, size, kept.data());
            for (i64 l = 0; l < L; ++l) {
                const i64 t = s.first + from + l;
                const float e = taken(t, h, u.data());
                walk(&kept[l * size], &kept[(l + 1) * size], row(t) + z.inner() + group * z.N, nullptr,
                     u.data(), e, nullptr, z.P, z.N);
            }
            for (i64 l = L - 1; l >= 0; --l) {
                const i64 t = s.first + from + l;
                const float* x = row(t) + h * z.P;
                const float* dy = of.y + t * z.inner() + h * z.P;
                const float step = of.dt[t * z.H + h], e = taken(t, h, u.data());
                const float* b = row(t) + z.inner() + group * z.N;
                float* db = bc + t * wide + group * z.N;
                const float left = back(&kept[l * size], &kept[(l + 1) * size], dS.data(), b, b + z.G * z.N,
                                        u.data(), dy, e, db, db + z.G * z.N, du.data());
                float* dx = mixed + t * z.conv() + h * z.P;
                for (i64 p = 0; p < z.P; ++p) dx[p] = step * du[p] + of.d[h] * dy[p];
                const float for_log = left * e;
                in[t * z.row() + z.inner() + z.conv() + h] = dot(x, du.data(), z.P) + A * for_log;
                for_a += double(step) * for_log;
                for_d += dot(x, dy, z.P);
            }
        }
        scalars[h] += float(for_a * A);
        scalars[z.H + h] += float(for_d);
    }

    // One token back; returns de.
    float back(const float* before, const float* S, float* dS, const float* b, const float* c, const float* u,
               const float* dy, float e, float* db, float* dc, float* du) const {
        const i64 P = of.s.P, N = of.s.N;
        F left = zero();
        std::fill_n(du, P, 0.0f);
        i64 n = 0;
        for (; n + 4 * LANES <= N; n += 4 * LANES)
            left = add(left, back_by<4>(before + n, S + n, dS + n, b + n, c + n, u, dy, e, db + n, dc + n, du));
        for (; n < N; n += LANES)
            left = add(left, back_by<1>(before + n, S + n, dS + n, b + n, c + n, u, dy, e, db + n, dc + n, du));
        return sum(left);
    }

    template <int V>
    F back_by(const float* before, const float* S, float* dS, const float* b, const float* c, const float* u,
              const float* dy, float e, float* db, float* dc, float* du) const {
        const i64 N = of.s.N;
        F in_[V], out_[V], for_b[V], for_c[V], left[V];
        for (int v = 0; v < V; ++v) {
            in_[v] = load(b + LANES * v), out_[v] = load(c + LANES * v);
            for_b[v] = load(db + LANES * v), for_c[v] = load(dc + LANES * v), left[v] = zero();
        }
        for (i64 p = 0; p < of.s.P; ++p) {
            const F y = all(dy[p]), x = all(u[p]);
            F seen = zero();
            for (int v = 0; v < V; ++v) {
                const i64 at = p * N + LANES * v;
                const F d = fma(y, out_[v], load(dS + at));
                for_c[v] = fma(y, load(S + at), for_c[v]);
                for_b[v] = fma(x, d, for_b[v]);
                left[v] = fma(d, load(before + at), left[v]);
                seen = fma(d, in_[v], seen);
                store(dS + at, mul(d, all(e)));
            }
            du[p] += sum(seen);
        }
        F all_ = zero();
        for (int v = 0; v < V; ++v) {
            store(db + LANES * v, for_b[v]), store(dc + LANES * v, for_c[v]);
            all_ = add(all_, left[v]);
        }
        return all_;
    }

    // Through softplus and its limits; what came is in `in`.
    void unstep(i64 r, float* bias) const {
        const Shape& s = of.s;
        for (i64 h = 0; h < s.H; ++h) {
            const i64 at = (r + 1) * s.row() - s.H + h;
            const float v = of.in[at] + of.dt_bias[h];
            const float soft = v > 20.0f ? v : std::log1p(std::exp(v));
            const bool moves = soft >= of.numbers[0] && soft <= of.numbers[1];
            in[at] *= !moves ? 0.0f : v > 20.0f ? 1.0f : 1.0f / (1.0f + std::exp(-v));
            bias[h] += in[at];
        }
    }

    // Through the convolution of the channels c0 to c1.
    void unconvolve(i64 c0, i64 c1) const {
        const Shape& s = of.s;
        const i64 n = c1 - c0, C = s.conv(), W = s.W;
        if (n <= 0) return;
        std::vector<float> turned((W + 1) * n), found((W + 1) * n);
        for (i64 c = 0; c < n; ++c) {
            for (i64 w = 0; w < W; ++w) turned[w * n + c] = of.taps[(c0 + c) * W + w];
            turned[W * n + c] = of.bias ? of.bias[c0 + c] : 0.0f;
        }
        for (const Sequence& one : of.sequences) {
            const float* x = of.in + one.first * s.row() + s.inner() + c0;
            float* dx = in + one.first * s.row() + s.inner() + c0;
            for (i64 t = 0; t < one.length; ++t) {
                const float* dy = mixed + (one.first + t) * C + c0;
                const i64 least = std::max<i64>(0, W - 1 - t);
                for (i64 c = 0; c < n; c += LANES) {
                    F made = load(&turned[W * n + c]);
                    for (i64 w = least; w < W; ++w)
                        made = fma(load(x + (t + w - (W - 1)) * s.row() + c), load(&turned[w * n + c]), made);
                    const F d = mul(load(dy + c), silu_slope(made));
                    store(&found[W * n + c], add(load(&found[W * n + c]), d));
                    // The last tap meets a token first.
                    store(dx + t * s.row() + c, mul(d, load(&turned[(W - 1) * n + c])));
                    for (i64 w = least; w < W; ++w) {
                        const i64 at = (t + w - (W - 1)) * s.row() + c;
                        store(&found[w * n + c], fma(d, load(x + at), load(&found[w * n + c])));
                        if (w < W - 1) store(dx + at, fma(d, load(&turned[w * n + c]), load(dx + at)));
                    }
                }
            }
        }
        for (i64 c = 0; c < n; ++c) {
            for (i64 w = 0; w < W; ++w) taps[(c0 + c) * W + w] = found[w * n + c];
            bias[c0 + c] = found[W * n + c];
        }
    }

    // By each thread of a team.
    void run(i64 thread, i64 threads) const {
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8040);  // decays that vanish become zero, not slow
        const Shape& s = of.s;
        const i64 blocks = s.conv() / LANES, wide = 2 * s.G * s.N;
        const Share tokens(of.M, thread, threads), tasks(of.sequences.count * s.H, thread, threads);
        const i64 c0 = blocks * thread / threads * LANES, c1 = blocks * (thread + 1) / threads * LANES;
        float *own = scalars + thread * 3 * s.H, *scale = weights + thread * s.inner();
        float* bc = by_thread + thread * of.M * wide;
        of.convolve(c0, c1);
        of.step_sizes(tokens.from, tokens.to);
#pragma omp barrier
        each_task(tasks, [&](const Sequence& one, i64 span, i64 h) { walk_along(one, span, h); });
#pragma omp barrier
        for (i64 r = tokens.from; r < tokens.to; ++r) unnormalise(r, scale);
#pragma omp barrier
        each_task(tasks, [&](const Sequence& one, i64 span, i64 h) { walk_back(one, span, h, bc, own); });
#pragma omp barrier
        for (i64 r = tokens.from; r < tokens.to; ++r) {
            float* to = mixed + r * s.conv() + s.inner();
            std::fill_n(to, wide, 0.0f);
            for (i64 k = 0; k < threads; ++k) add_to(to, by_thread + (k * of.M + r) * wide, wide);
            unstep(r, own + 2 * s.H);
        }
#pragma omp barrier
        unconvolve(c0, c1);
        _mm_setcsr(mode);
    }

    template <class Fn>
    void each_task(const Share& tasks, const Fn& fn) const {
        i64 span = 0, at = 0;
        for (const Sequence& one : of.sequences) {
            for (i64 h = 0; h < of.s.H; ++h, ++at)
                if (at >= tasks.from && at < tasks.to) fn(one, span, h);
            span += spans(one);
        }
    }
};

}  // namespace quintet
