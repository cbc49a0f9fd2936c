// Attention with keys and values as they are.
#include "attention.h"

using namespace quintet;

namespace {

// Queries (B, H, T, D) and keys (B, heads, S, D), one of two parts; without the second, zeros.
struct Joined {
    i64 D, heads;
    Span<const bf16> q;
    Strides q_at;
    Span<const bf16> k;
    Strides k_at;

    bool fits(i64 B, i64 H, i64 T, i64 S, i64 K) const {
        if (!D) return true;
        return D > 0 && D % 2 == 0 && (heads == 1 || heads == K) &&
               q.holds({{B, q_at.row}, {H, q_at.head}, {T, q_at.token}, {D, 1}}) &&
               k.holds({{B, k_at.row}, {heads, k_at.head}, {S, k_at.token}, {D, 1}});
    }
    // A head of all is at no distance from itself.
    Strides steps() const { return {k_at.row, heads > 1 ? k_at.head : 0, k_at.token}; }
};

struct Call {
    i64 B, H, K, T, S, Dv, window;
    double scale;
    Joined one, two;
    Span<const bf16> v;  // (B, K, S, Dv)
    Strides v_at;
    Span<bf16> out;  // (B, T, H, Dv)

    const i64* start() const { return behind<i64>(this); }  // (B)
    i64 size() const { return i64(sizeof(Call)) + 8 * B; }
    bool fits() const {
        return B > 0 && T > 0 && S > 0 && K > 0 && H > 0 && H % K == 0 && window >= 0 && one.D > 0 &&
               Dv > 0 && Dv % WIDEST == 0 && one.fits(B, H, T, S, K) && two.fits(B, H, T, S, K) &&
               v.holds({{B, v_at.row}, {K, v_at.head}, {S, v_at.token}, {Dv, 1}}) &&
               out.holds(B * T * H * Dv) &&
               std::all_of(start(), start() + B, [](i64 slot) { return slot >= 0; });
    }
};

void run(const Call& c) {
    std::vector<Sequence> rows;
    for (i64 b = 0; b < c.B; ++b) rows.push_back({b, c.start()[b], c.T, b});
    const Attention a{c.S, c.K, c.H / c.K, c.one.D, c.two.D, c.Dv, c.window,
                      c.one.q, c.two.q, c.one.k, c.two.k, c.v, c.out,
                      c.one.q_at, c.two.q_at, c.one.steps(), c.two.steps(), c.v_at,
                      {c.T * c.H * c.Dv, c.Dv, c.H * c.Dv}, {rows.data(), c.B}};
    const Division division(a, omp_get_max_threads());
    float* memory = memory_of(division);
#pragma omp parallel
    attend(a, float(c.scale), division, memory);
}

}  // namespace

QUINTET_ENTRY(attention_bf16, Call, run)
