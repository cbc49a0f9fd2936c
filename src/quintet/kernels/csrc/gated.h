// The first half of a gated MLP: silu(gate x) · up x.
#pragma once
#include "matrix.h"

namespace {

// Its numbers [from, to) for n vectors, each `row` from the one before; `made` is room to work in.
template <class Matrix, class T>
void gate_rows(const Matrix& gate, const Matrix& up, const typename Matrix::Input* x, i64 n, i64 from,
               i64 to, T* hidden, i64 row, std::vector<float>& made) {
    const i64 width = to - from;
    made.resize(size_t(2 * n * width));
    gate.rows(x, n, from, to, {made.data(), width, from});
    up.rows(x, n, from, to, {made.data() + n * width, width, from});
    for (i64 m = 0; m < n; ++m) {
        const float *g = made.data() + m * width, *u = g + n * width;
        T* h = hidden + m * row + from;
        i64 i = 0;
        for (; i + LANES <= width; i += LANES) store(h + i, mul(silu(load(g + i)), load(u + i)));
        if (i < width) store(h + i, mul(silu(load(g + i, width - i)), load(u + i, width - i)), width - i);
    }
}

}  // namespace
