// Latent attention by itself.
#include "latent.h"

using namespace quintet;

namespace {

struct Call {
    i64 B, H, T, S, Dn, Dr, Dv, R;
    double scale;
    Span<const bf16> q_nope;  // (B, H, T, Dn)
    Strides nope_at;
    Span<const bf16> q_pe;  // (B, H, T, Dr)
    Strides pe_at;
    Span<const bf16> c_kv;  // (B, S, R)
    i64 c_row, c_token;
    Span<const bf16> k_pe;  // (B, S, Dr)
    i64 k_row, k_token;
    Span<const bf16> w;                // (H, Dn + Dv, R)
    Span<bf16> q_latent, mixed, out;   // (B, T, H, R) twice, (B, T, H, Dv)

    const i64* start() const { return behind<i64>(this); }  // (B)
    i64 size() const { return i64(sizeof(Call)) + 8 * B; }
    bool fits() const {
        return B > 0 && H > 0 && T > 0 && S > 0 && Dn > 0 && Dr > 0 && Dv > 0 && R > 0 &&
               Dn % 2 == 0 && Dr % 2 == 0 && R % WIDEST == 0 &&
               q_nope.holds({{B, nope_at.row}, {H, nope_at.head}, {T, nope_at.token}, {Dn, 1}}) &&
               q_pe.holds({{B, pe_at.row}, {H, pe_at.head}, {T, pe_at.token}, {Dr, 1}}) &&
               c_kv.holds({{B, c_row}, {S, c_token}, {R, 1}}) &&
               k_pe.holds({{B, k_row}, {S, k_token}, {Dr, 1}}) && w.holds(H * (Dn + Dv) * R) &&
               q_latent.holds(B * T * H * R) && mixed.holds(B * T * H * R) && out.holds(B * T * H * Dv) &&
               std::all_of(start(), start() + B, [](i64 slot) { return slot >= 0; });
    }
};

void run(const Call& c) {
    std::vector<Sequence> rows;
    for (i64 b = 0; b < c.B; ++b) rows.push_back({b, c.start()[b], c.T, b});
    const Latent latent{c.B, c.T, c.S, c.H, c.Dn, c.Dr, c.Dv, c.R, c.T,
                        c.q_nope, c.q_pe, c.c_kv, c.k_pe, c.w, c.q_latent, c.mixed, c.out,
                        c.nope_at, c.pe_at, {c.c_row, 0, c.c_token}, {c.k_row, 0, c.k_token}, {rows.data(), c.B}};
    const Division division(latent.attention(), omp_get_max_threads());
    float* memory = memory_of(division);
#pragma omp parallel
    attend(latent, float(c.scale), division, memory);
}

}  // namespace

QUINTET_ENTRY(latent_bf16, Call, run)
