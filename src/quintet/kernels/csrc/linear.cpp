// y = W x + b for few vectors x: bound by how fast W is read.
#include <omp.h>

#include "dense.h"

namespace {

template <class T>
void linears(const Dense<T>* maps, i64 count, const T* x, i64 M, i64 I, i64 x_stride) {
    i64 rows = 0;
    for (i64 k = 0; k < count; ++k) rows += maps[k].O;
    const bool alone = rows * I * i64(sizeof(T)) < SMALL;
#pragma omp parallel if (!alone)
    {
        const Share mine(rows, omp_get_thread_num(), omp_get_num_threads());
        i64 before = 0;
        for (i64 k = 0; k < count; ++k) {
            const i64 from = std::max(mine.from - before, i64(0));
            const i64 to = std::min(mine.to - before, maps[k].O);
            if (from < to) maps[k].rows(x, M, I, x_stride, from, to);
            before += maps[k].O;
        }
    }
}

}  // namespace

extern "C" {

void quintet_linear_bf16(const Dense<bf16>* maps, i64 count, const bf16* x, i64 M, i64 I, i64 x_stride) {
    linears(maps, count, x, M, I, x_stride);
}

void quintet_linear_f32(const Dense<float>* maps, i64 count, const float* x, i64 M, i64 I, i64 x_stride) {
    linears(maps, count, x, M, I, x_stride);
}
}
