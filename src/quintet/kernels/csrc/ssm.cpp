// Mamba-2's mixer between its projections, by a team of its own.
#include "ssm.h"

#include <omp.h>

using namespace quintet;

namespace {

template <class T>
struct Call {
    i64 B, tokens;
    Shape s;
    double least, most, eps;  // of the steps, and what is added to the mean square
    Span<const T> in;         // (B, T, row)
    Span<const T> taps;       // (conv, W)
    Span<const T> bias;       // (conv) or null
    Span<const T> window;     // (B, W - 1, conv) or null
    Span<const float> dt_bias, a_log, d;  // (H)
    Span<const i64> counts;               // (B) or null
    Span<const T> weight;                 // (inner)
    Span<float> state;                    // (B, H, P, N)
    Span<T> next_window;
    Span<float> mixed, dt, y;  // (B, T, conv), (B, T, H), (B, T, inner)
    Span<T> out;               // (B, T, inner)

    i64 size() const { return sizeof(Call); }
    bool fits() const {
        const i64 rows = B * tokens, past = B * (s.W - 1) * s.conv();
        return B > 0 && tokens > 0 && s.fits() && in.holds(rows * s.row()) && taps.holds(s.conv() * s.W) &&
               (!bias.given() || bias.holds(s.conv())) && (!window.given() || window.holds(past)) && dt_bias.holds(s.H) &&
               a_log.holds(s.H) && d.holds(s.H) && weight.holds(s.inner()) &&
               state.holds(B * s.H * s.P * s.N) && next_window.holds(past) && mixed.holds(rows * s.conv()) &&
               dt.holds(rows * s.H) && y.holds(rows * s.inner()) && out.holds(rows * s.inner()) &&
               (!counts.given() || (counts.holds(B) && std::all_of(counts.p, counts + B, [this](i64 n) { return 0 <= n && n <= tokens; })));
    }
};

template <class T>
void mix(const Call<T>& c) {
    const float numbers[] = {float(c.least), float(c.most), float(c.eps)};
    std::vector<Sequence> rows;
    for (i64 b = 0; b < c.B; ++b) rows.push_back({b, 0, c.tokens, b * c.tokens});
    const Mixer<T> mixer{c.s,       c.B * c.tokens, {rows.data(), c.B}, c.counts, c.in,    c.taps, c.bias, c.window,
                         c.next_window, c.dt_bias, c.a_log, c.d, c.state, c.mixed, c.dt, c.y, c.weight, c.out, numbers};
#pragma omp parallel
    mixer.run(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

QUINTET_ENTRY(mamba2_bf16, Call<bf16>, mix)
QUINTET_ENTRY(mamba2_f32, Call<float>, mix)
