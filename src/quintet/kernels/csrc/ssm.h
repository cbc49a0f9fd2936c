// Mamba-2's mixer between its two projections: convolution, state space, gated norm, in one pass.
//
// Letters as in quintet/ops/ssd.py. Everything is float32 inside. A thread keeps its heads from the
// first chunk to the last, so that a state is read and written once a chunk and never shared.
#pragma once
#include <vector>

#include "accumulate.h"
#include "sequences.h"

namespace quintet {

constexpr int CHUNK = 64;

struct Shape {
    i64 H, P, G, N, W;

    // Whatever the level, vectors of 16 are whole.
    bool fits() const {
        return H > 0 && P > 0 && G > 0 && N > 0 && W > 0 && H % G == 0 && P % 16 == 0 &&
               N % 16 == 0;
    }
    i64 inner() const { return H * P; }
    i64 conv() const { return H * P + 2 * G * N; }
    i64 row() const { return inner() + conv() + H; }  // of the input: z, x b c, dt
};

template <class T>
struct Mixer {
    Shape s;
    i64 M;
    Sequences sequences;
    const i64* counts;  // how many of each sequence's tokens are real; null where all are
    const T* in;        // (M, row)
    const T* taps;      // (conv, W)
    const T* bias;      // (conv) or null
    const T* window;    // (rows, W - 1, conv) or null
    T* next_window;
    const float *dt_bias, *a_log, *d;  // (H)
    float* state;                      // (rows, H, P, N)
    float *mixed, *dt, *y;             // (M, conv), (M, H), (M, inner)
    const T* weight;                   // (inner)
    T* out;                            // (M, inner)
    const float* numbers;              // the least and the largest step, the norm's epsilon

    i64 count(const Sequence& of) const { return counts ? counts[&of - sequences.p] : of.length; }

    // y_t = silu(bias + Σ_w taps_w · x_{t+w-W+1}) of the channels c0 to c1.
    void convolve(i64 c0, i64 c1) const {
        const i64 n = c1 - c0, C = s.conv(), row = s.row();
        if (n <= 0) return;
        std::vector<float> turned((s.W + 1) * n);  // taps by place, then the bias
        for (i64 c = 0; c < n; ++c) {
            for (i64 w = 0; w < s.W; ++w)
                turned[w * n + c] = widen(taps[(c0 + c) * s.W + w]);
            turned[s.W * n + c] = bias ? widen(bias[c0 + c]) : 0.0f;
        }
        for (const Sequence& of : sequences) {
            const T* x = in + of.first * row + s.inner() + c0;
            const T* old = window ? window + of.row * (s.W - 1) * C + c0 : nullptr;
            for (i64 t = 0; t < of.length; ++t) {
                float* to = mixed + (of.first + t) * C + c0;
                for (i64 c = 0; c < n; c += LANES) {
                    F made = load(&turned[s.W * n + c]);
                    for (i64 w = 0; w < s.W; ++w) {
                        const i64 at = t + w - (s.W - 1);
                        if (at >= 0)
                            made = fma(load(x + at * row + c), load(&turned[w * n + c]), made);
                        else if (old)
                            made = fma(load(old + (at + s.W - 1) * C + c), load(&turned[w * n + c]), made);
                    }
                    store(to + c, silu(made));
                }
            }
            for (i64 w = 0; w < s.W - 1; ++w) {
                const i64 at = count(of) + w - (s.W - 1);
                T* to = next_window + (of.row * (s.W - 1) + w) * C + c0;
                if (at >= 0) std::copy_n(x + at * row, n, to);
                else if (old) std::copy_n(old + (at + s.W - 1) * C, n, to);
                else std::fill_n(to, n, T{});
            }
        }
    }

    // softplus(dt + bias) within limits; 0 for padding, which leaves a state as it is.
    void step_sizes(i64 r0, i64 r1) const {
        for (const Sequence& of : sequences)
            for (i64 r = std::max(r0, of.first); r < std::min(r1, of.first + of.length); ++r) {
                const T* raw = in + (r + 1) * s.row() - s.H;
                const bool real = r - of.first < count(of);
                for (i64 h = 0; h < s.H; ++h) {
                    const float v = widen(raw[h]) + dt_bias[h];
                    const float soft = v > 20.0f ? v : std::log1p(std::exp(v));
                    dt[r * s.H + h] = real ? std::min(std::max(soft, numbers[0]), numbers[1]) : 0.0f;
                }
            }
    }

    // One token: S = exp(dt·A)·S + dt·x ⊗ b;  y = S·c + D·x.
    void one(const Sequence& of, i64 h) const {
        const float* row = mixed + of.first * s.conv();
        const float* x = row + h * s.P;
        const float* in_ = row + s.inner() + h / (s.H / s.G) * s.N;
        const float* out_ = in_ + s.G * s.N;
        const float step = dt[of.first * s.H + h];
        const float decay = std::exp(-step * std::exp(a_log[h]));
        float* S = state + (of.row * s.H + h) * s.P * s.N;
        for (i64 p = 0; p < s.P; ++p, S += s.N) {
            F seen = zero();
            for (i64 n = 0; n < s.N; n += LANES) {
                const F kept = mul(load(S + n), all(decay));
                const F v = fma(load(in_ + n), all(step * x[p]), kept);
                store(S + n, v);
                seen = fma(v, load(out_ + n), seen);
            }
            y[of.first * s.inner() + h * s.P + p] = sum(seen) + d[h] * x[p];
        }
    }

    // All tokens of a sequence, for its heads h0 to h1, chunk by chunk (arXiv:2405.21060, §6).
    void scan(const Sequence& of, i64 h0, i64 h1) const {
        const i64 C = s.conv(), P = s.P, N = s.N, R = s.H / s.G;
        std::vector<float> states((h1 - h0) * N * P), met(CHUNK * CHUNK), mix(CHUNK * CHUNK),
            taken(CHUNK * P), turned(N * CHUNK), since(CHUNK), until(CHUNK);
        for (i64 h = h0; h < h1; ++h) {
            const float* S = state + (of.row * s.H + h) * P * N;
            for (i64 p = 0; p < P; ++p)
                for (i64 n = 0; n < N; ++n) states[((h - h0) * N + n) * P + p] = S[p * N + n];
        }
        for (i64 t0 = 0; t0 < of.length; t0 += CHUNK) {
            const i64 L = std::min<i64>(CHUNK, of.length - t0);
            const float* rows = mixed + (of.first + t0) * C;
            i64 group = -1;
            const float *in_ = nullptr, *out_ = nullptr;
            for (i64 h = h0; h < h1; ++h) {
                if (h / R != group) {
                    group = h / R;
                    in_ = rows + s.inner() + group * N;
                    out_ = in_ + s.G * N;
                    // c·bᵀ, the same for all heads of a group.
                    for (i64 l = 0; l < L; ++l)
                        for (i64 n = 0; n < N; ++n) turned[n * CHUNK + l] = in_[l * C + n];
                    for (i64 n = 0; n < N; ++n)
                        std::fill(&turned[n * CHUNK + L], &turned[n * CHUNK] + CHUNK, 0.0f);
                    std::fill(met.begin(), met.end(), 0.0f);
                    accumulate(met.data(), CHUNK, out_, C, 1, turned.data(), CHUNK, L, N, CHUNK);
                }
                chunk(of.first + t0, h, L, rows, in_, out_, &states[(h - h0) * N * P], met.data(),
                      mix.data(), taken.data(), since.data(), until.data());
            }
        }
        for (i64 h = h0; h < h1; ++h) {
            float* S = state + (of.row * s.H + h) * P * N;
            for (i64 p = 0; p < P; ++p)
                for (i64 n = 0; n < N; ++n) S[p * N + n] = states[((h - h0) * N + n) * P + p];
        }
    }

    void chunk(i64 first, i64 h, i64 L, const float* rows,
                             const float* in_, const float* out_, float* S, const float* met,
                             float* mix, float* taken, float* since, float* until) const {
        const i64 C = s.conv(), P = s.P, N = s.N;
        const float* steps = dt + first * s.H + h;
        const float a = -std::exp(a_log[h]);
        // decay(l, r) = Π exp(dt_i·A), r < i <= l, as a running product: no sums that cancel.
        float decay[CHUNK];
        std::fill_n(mix, CHUNK * CHUNK, 0.0f);
        for (i64 l = 0; l < L; ++l) {
            const float e = std::exp(steps[l * s.H] * a);
            since[l] = l ? since[l - 1] * e : e;
            for (i64 r = 0; r < l; ++r) decay[r] *= e;
            decay[l] = 1.0f;
            for (i64 r = 0; r <= l; ++r) mix[l * CHUNK + r] = met[l * CHUNK + r] * decay[r];
        }
        for (i64 l = 0; l < L; ++l) until[l] = decay[l];
        float* to = y + first * s.inner() + h * P;
        for (i64 l = 0; l < L; ++l) {
            const float* x = rows + l * C + h * P;
            for (i64 p = 0; p < P; p += LANES) {
                store(taken + l * P + p, mul(load(x + p), all(steps[l * s.H])));
                store(to + l * s.inner() + p, zero());
            }
        }
        accumulate(to, s.inner(), out_, C, 1, S, P, L, N, P);
        for (i64 l = 0; l < L; ++l) {
            const float* x = rows + l * C + h * P;
            float* o = to + l * s.inner();
            for (i64 p = 0; p < P; p += LANES)
                store(o + p, fma(load(o + p), all(since[l]), mul(load(x + p), all(d[h]))));
        }
        // Below the diagonal, in two steps: the upper right quarter is zero.
        const i64 half = std::min<i64>(L, CHUNK / 2);
        accumulate(to, s.inner(), mix, CHUNK, 1, taken, P, half, half, P);
        if (L > half)
            accumulate(to + half * s.inner(), s.inner(), mix + half * CHUNK, CHUNK, 1, taken, P,
                       L - half, L, P);
        const float kept = since[L - 1];
        for (i64 i = 0; i < N * P; i += LANES) store(S + i, mul(load(S + i), all(kept)));
        for (i64 l = 0; l < L; ++l)
            for (i64 p = 0; p < P; p += LANES)
                store(taken + l * P + p, mul(load(taken + l * P + p), all(until[l])));
        accumulate(S, P, in_, 1, C, taken, P, N, L, P);
    }

    // y · silu(z), each group scaled to unit root mean square, times the weight.
    void normalise(i64 r0, i64 r1) const {
        const i64 width = s.inner() / s.G;
        for (i64 r = r0; r < r1; ++r) {
            for (i64 g = 0; g < s.G; ++g) {
                float* v = y + r * s.inner() + g * width;
                const T* z = in + r * s.row() + g * width;
                F squares = zero();
                for (i64 i = 0; i < width; i += LANES) {
                    const F x = mul(load(v + i), silu(load(z + i)));
                    store(v + i, x);
                    squares = fma(x, x, squares);
                }
                const float scale = 1.0f / std::sqrt(sum(squares) / width + numbers[2]);
                for (i64 i = 0; i < width; i += LANES)
                    store(out + r * s.inner() + g * width + i,
                          mul(mul(load(v + i), all(scale)), load(weight + g * width + i)));
            }
        }
    }

    // By each thread of a team.
    void run(i64 thread, i64 threads) const {
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8040);  // decays that vanish become zero, not slow
        const i64 blocks = s.conv() / LANES;
        const Share tokens(M, thread, threads), heads(s.H, thread, threads);
        convolve(blocks * thread / threads * LANES, blocks * (thread + 1) / threads * LANES);
        step_sizes(tokens.from, tokens.to);
#pragma omp barrier
        for (const Sequence& of : sequences) {
            for (i64 h = heads.from; of.length == 1 && h < heads.to; ++h) one(of, h);
            if (of.length > 1 && heads.from < heads.to) scan(of, heads.from, heads.to);
        }
#pragma omp barrier
        normalise(tokens.from, tokens.to);
        _mm_setcsr(mode);
    }
};

}  // namespace quintet
