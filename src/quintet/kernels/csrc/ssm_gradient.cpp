// Mamba-2's mixer where it learns: any number of texts from their beginnings, and the gradient.
#include "ssm_gradient.h"

#include <omp.h>

using namespace quintet;

namespace {

struct Texts {
    i64 M, count;
    Shape s;
    double least, most, eps;    // of the steps, and what is added to the mean square
    Span<const i64> lengths;    // (count), that sum to M
    Span<const float> in;       // (M, row)
    Span<const float> taps;     // (conv, W)
    Span<const float> bias;     // (conv) or null
    Span<const float> dt_bias, a_log, d;  // (H)
    Span<const float> weight;             // (inner)

    bool fits() const {
        if (M <= 0 || count <= 0 || !s.fits() || !lengths.holds(count)) return false;
        i64 left = M;
        for (i64 i = 0; i < count; ++i) {
            if (lengths[i] <= 0 || lengths[i] > left) return false;
            left -= lengths[i];
        }
        return left == 0 && in.holds(M * s.row()) && taps.holds(s.conv() * s.W) &&
               (!bias.given() || bias.holds(s.conv())) && dt_bias.holds(s.H) && a_log.holds(s.H) && d.holds(s.H) &&
               weight.holds(s.inner());
    }
    std::vector<Sequence> sequences() const {
        std::vector<Sequence> all;
        for (i64 i = 0, first = 0; i < count; first += lengths[i++]) all.push_back({i, 0, lengths[i], first});
        return all;
    }
    Mixer<float> mixer(const std::vector<Sequence>& rows, const float* numbers, float* window, float* state,
                       float* mixed, float* dt, float* y, float* out) const {
        return {s, M, {rows.data(), count}, nullptr, in, taps, bias, nullptr, window, dt_bias, a_log, d,
                state, mixed, dt, y, weight, out, numbers};
    }
};

struct LearnCall {
    Texts texts;
    Span<float> out;  // (M, inner)

    i64 size() const { return sizeof(LearnCall); }
    bool fits() const { return texts.fits() && out.holds(texts.M * texts.s.inner()); }
};

void learn(const LearnCall& c) {
    const Texts& t = c.texts;
    const Shape& s = t.s;
    const float numbers[] = {float(t.least), float(t.most), float(t.eps)};
    const auto rows = t.sequences();
    const Floats window = floats(t.count * (s.W - 1) * s.conv()), state = zeros(t.count * s.inner() * s.N);
    const Floats mixed = floats(t.M * s.conv()), dt = floats(t.M * s.H), y = floats(t.M * s.inner());
    const auto mixer = t.mixer(rows, numbers, window.get(), state.get(), mixed.get(), dt.get(), y.get(), c.out);
#pragma omp parallel
    mixer.run(omp_get_thread_num(), omp_get_num_threads());
}

struct GradientCall {
    Texts texts;
    Span<const float> given;  // (M, inner)
    Span<float> in;           // (M, row)
    Span<float> taps, bias;   // (conv, W), (conv)
    Span<float> dt_bias, a_log, d, weight;

    i64 size() const { return sizeof(GradientCall); }
    bool fits() const {
        if (!texts.fits()) return false;
        const Shape& s = texts.s;
        return given.holds(texts.M * s.inner()) && in.holds(texts.M * s.row()) && taps.holds(s.conv() * s.W) &&
               bias.holds(s.conv()) && dt_bias.holds(s.H) && a_log.holds(s.H) && d.holds(s.H) &&
               weight.holds(s.inner());
    }
};

void derive(const GradientCall& c) {
    const Texts& t = c.texts;
    const Shape& s = t.s;
    const float numbers[] = {float(t.least), float(t.most), float(t.eps)};
    const auto rows = t.sequences();
    const i64 threads = omp_get_max_threads();
    i64 spans = 0;
    for (const Sequence& one : rows) spans += (one.length + SPAN - 1) / SPAN;
    const Floats window = floats(t.count * (s.W - 1) * s.conv());
    const Floats mixed = floats(t.M * s.conv()), dt = floats(t.M * s.H), y = floats(t.M * s.inner());
    const Floats states = floats(spans * s.inner() * s.N), back = floats(t.M * s.conv());
    const Floats bc = zeros(threads * t.M * 2 * s.G * s.N), scalars = zeros(threads * 3 * s.H);
    const Floats weights = zeros(threads * s.inner());
    const Gradient gradient{
        t.mixer(rows, numbers, window.get(), nullptr, mixed.get(), dt.get(), y.get(), nullptr),
        c.given, c.in, c.taps, c.bias, c.dt_bias, c.a_log, c.d, c.weight,
        states.get(), back.get(), bc.get(), scalars.get(), weights.get()};
#pragma omp parallel num_threads(int(threads))
    gradient.run(omp_get_thread_num(), omp_get_num_threads());
    std::fill_n(c.weight.p, s.inner(), 0.0f);
    float* all[] = {c.a_log, c.d, c.dt_bias};
    for (float* one : all) std::fill_n(one, s.H, 0.0f);
    for (i64 k = 0; k < threads; ++k) {
        add_to(c.weight, weights.get() + k * s.inner(), s.inner());
        for (i64 i = 0; i < 3; ++i) add_to(all[i], scalars.get() + (3 * k + i) * s.H, s.H);
    }
}

}  // namespace

QUINTET_ENTRY(mamba2_learn, LearnCall, learn)
QUINTET_ENTRY(mamba2_gradient, GradientCall, derive)
