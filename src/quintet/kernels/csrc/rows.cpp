// What is done row by row between the products: normalise, rotate, gate.
#include <omp.h>

#include "rows.h"

namespace {

// Numbers below which one thread does it all.
constexpr i64 FEW = 16384;

template <class T>
void rms_norm(const T* x, const T* weight, T* y, i64 rows, i64 C, float eps) {
#pragma omp parallel for if (rows > 1 && rows * C >= FEW) schedule(static)
    for (i64 r = 0; r < rows; ++r) normalise(x + r * C, weight, y + r * C, C, eps);
}

// x (B, H, T, D) with any strides but the last; y (B, T, H, D); cos and sin (B or 1, T, D). The
// pairs are i and i + D/2 of x, or neighbours, which then part to i and i + D/2 of y.
template <class T>
struct Rotation {
    const T* x;
    T* y;
    i64 row, head, token, H;
};

template <class T>
void rotate(const Rotation<T>* parts, i64 count, const T* cos, const T* sin, i64 angle_row, i64 B,
            i64 tokens, i64 D, bool neighbours) {
    i64 heads = 0;
    for (i64 k = 0; k < count; ++k) heads += parts[k].H;
#pragma omp parallel for if (B * tokens > 1 && B * tokens * heads * D >= FEW) schedule(static)
    for (i64 at = 0; at < B * tokens; ++at) {
        const i64 b = at / tokens, t = at % tokens;
        const T *c = cos + b * angle_row + t * D, *s = sin + b * angle_row + t * D;
        for (i64 k = 0; k < count; ++k)
            for (i64 h = 0; h < parts[k].H; ++h) {
                const T* from = parts[k].x + b * parts[k].row + h * parts[k].head + t * parts[k].token;
                T* to = parts[k].y + (at * parts[k].H + h) * D;
                if (neighbours)
                    rotate_neighbours(from, to, c, s, D);
                else
                    rotate_head(from, to, c, s, D);
            }
    }
}

template <class T>
void silu_mul(const T* gate, const T* up, T* y, i64 rows, i64 width, i64 gate_row, i64 up_row) {
#pragma omp parallel for if (rows > 1 && rows * width >= FEW) schedule(static)
    for (i64 r = 0; r < rows; ++r) {
        const T *g = gate + r * gate_row, *u = up + r * up_row;
        each_vector<T>(width, [&](i64 i, auto last) {
            set(y + r * width, i, width, mul(silu(get(g, i, width, last)), get(u, i, width, last)), last);
        });
    }
}

}  // namespace

#define QUINTET_ROWS(name, T)                                                                      \
    extern "C" void quintet_rms_norm_##name(const T* x, const T* w, T* y, i64 rows, i64 C, float eps) { \
        rms_norm(x, w, y, rows, C, eps);                                                           \
    }                                                                                              \
    extern "C" void quintet_rotate_##name(const Rotation<T>* parts, i64 count, const T* cos,       \
                                          const T* sin, i64 angle_row, i64 B, i64 tokens, i64 D,   \
                                          i64 neighbours) {                                        \
        rotate(parts, count, cos, sin, angle_row, B, tokens, D, neighbours != 0);                  \
    }                                                                                              \
    extern "C" void quintet_silu_mul_##name(const T* gate, const T* up, T* y, i64 rows, i64 width, \
                                            i64 gate_row, i64 up_row) {                            \
        silu_mul(gate, up, y, rows, width, gate_row, up_row);                                      \
    }
QUINTET_ROWS(bf16, bf16)
QUINTET_ROWS(f32, float)
