// What is done row by row between the products: normalise, rotate, gate.
#include "rows.h"

#include <omp.h>

#include "span.h"

using namespace quintet;

namespace {

// Numbers below which one thread does it all.
constexpr i64 FEW = 16384;

template <class T>
struct NormCall {
    i64 rows, C;
    double eps;
    Span<const T> x, weight;  // (rows, C), (C)
    Span<T> y;                // (rows, C)

    i64 size() const { return sizeof(NormCall); }
    bool fits() const { return rows >= 0 && C > 0 && x.holds(rows * C) && weight.holds(C) && y.holds(rows * C); }
};

template <class T>
void rms_norm(const NormCall<T>& c) {
    const i64 C = c.C;
#pragma omp parallel for if (c.rows > 1 && c.rows * C >= FEW) schedule(static)
    for (i64 r = 0; r < c.rows; ++r) normalise(c.x + r * C, c.weight.p, c.y + r * C, C, float(c.eps));
}

// x (B, H, T, D) with any steps but the last; y (B, T, H, D). The pairs are i and i + D/2 of x, or
// neighbours, which then part to i and i + D/2 of y.
template <class T>
struct Rotation {
    i64 H;
    Span<const T> x;
    i64 row, head, token;
    Span<T> y;
};

template <class T>
struct RotateCall {
    i64 B, tokens, D, neighbours, turns, count;
    Span<const T> cos, sin;  // (turns, tokens, D), of one row for all or of each

    const Rotation<T>* parts() const { return behind<Rotation<T>>(this); }
    i64 size() const { return i64(sizeof(RotateCall)) + count * i64(sizeof(Rotation<T>)); }
    bool fits() const {
        return B >= 0 && tokens >= 0 && D > 0 && D % 2 == 0 && (turns == 1 || turns == B) &&
               cos.holds(turns * tokens * D) && sin.holds(turns * tokens * D) &&
               std::all_of(parts(), parts() + count, [this](const Rotation<T>& of) {
                   return of.x.holds({{B, of.row}, {of.H, of.head}, {tokens, of.token}, {D, 1}}) &&
                          of.y.holds(B * of.H * tokens * D);
               });
    }
};

template <class T>
void rotate(const RotateCall<T>& c) {
    const i64 tokens = c.tokens, D = c.D;
    i64 heads = 0;
    for (i64 k = 0; k < c.count; ++k) heads += c.parts()[k].H;
#pragma omp parallel for if (c.B * tokens > 1 && c.B * tokens * heads * D >= FEW) schedule(static)
    for (i64 at = 0; at < c.B * tokens; ++at) {
        const i64 b = at / tokens, t = at % tokens, angle = (c.turns > 1 ? at : t) * D;
        for (i64 k = 0; k < c.count; ++k) {
            const Rotation<T>& of = c.parts()[k];
            for (i64 h = 0; h < of.H; ++h) {
                const T* from = of.x + b * of.row + h * of.head + t * of.token;
                T* to = of.y + (at * of.H + h) * D;
                if (c.neighbours)
                    rotate_neighbours(from, to, c.cos + angle, c.sin + angle, D);
                else
                    rotate_head(from, to, c.cos + angle, c.sin + angle, D);
            }
        }
    }
}

template <class T>
struct GateCall {
    i64 rows, width;
    Span<const T> gate, up;  // (rows, width)
    Span<T> y;

    i64 size() const { return sizeof(GateCall); }
    bool fits() const {
        const i64 n = rows * width;
        return rows >= 0 && width > 0 && gate.holds(n) && up.holds(n) && y.holds(n);
    }
};

// act(gate, up, where gate lies) of all numbers.
template <class T, class Fn>
void gate_by(const GateCall<T>& c, const Fn& act) {
    const i64 width = c.width;
#pragma omp parallel for if (c.rows > 1 && c.rows * width >= FEW) schedule(static)
    for (i64 r = 0; r < c.rows; ++r) {
        const T *g = c.gate + r * width, *u = c.up + r * width;
        T* y = c.y + r * width;
        each_vector<T>(width, [&](i64 i, auto last) {
            set(y, i, width, act(get(g, i, width, last), get(u, i, width, last), g), last);
        });
    }
}

template <class T>
void silu_mul(const GateCall<T>& c) {
    gate_by(c, [](F gate, F up, const T*) { return mul(silu(gate), up); });
}

// Rounded between the two, as the block that layers share does.
template <class T>
void gelu_mul(const GateCall<T>& c) {
    gate_by(c, [](F gate, F up, const T* as) { return mul(round_to(gelu(gate), as), up); });
}

template <class T>
struct SigmoidCall {
    i64 n;
    Span<const T> x;
    Span<T> y;

    i64 size() const { return sizeof(SigmoidCall); }
    bool fits() const { return n >= 0 && x.holds(n) && y.holds(n); }
};

// Number by number: a vector's tail would be computed another way.
template <class T>
void sigmoid(const SigmoidCall<T>& c) {
    for (i64 i = 0; i < c.n; ++i) narrow(1.0f / (1.0f + std::exp(-widen(c.x[i]))), c.y + i);
}

}  // namespace

QUINTET_ENTRY(rms_norm_bf16, NormCall<bf16>, rms_norm)
QUINTET_ENTRY(rms_norm_f32, NormCall<float>, rms_norm)
QUINTET_ENTRY(rotate_bf16, RotateCall<bf16>, rotate)
QUINTET_ENTRY(rotate_f32, RotateCall<float>, rotate)
QUINTET_ENTRY(silu_mul_bf16, GateCall<bf16>, silu_mul)
QUINTET_ENTRY(silu_mul_f32, GateCall<float>, silu_mul)
QUINTET_ENTRY(gelu_mul_bf16, GateCall<bf16>, gelu_mul)
QUINTET_ENTRY(sigmoid_bf16, SigmoidCall<bf16>, sigmoid)
