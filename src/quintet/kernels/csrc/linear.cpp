// y = W x + b for several W of the same few vectors x.
#include <omp.h>

#include "matrix.h"

namespace {

// W (O, I), b (O) or null, y (M, O), as Python fills it in: eight bytes a field.
template <class T>
struct Map {
    const void* w;
    const void* scale;
    const T* b;
    T* y;
    i64 O;
    i64 stride;
};

template <class T>
Plain<T> matrix(const Map<T>& map, i64 I, Plain<T>*) {
    return {static_cast<const T*>(map.w), I, map.stride};
}
template <class T>
Int8 matrix(const Map<T>& map, i64 I, Int8*) {
    return {static_cast<const int8_t*>(map.w), static_cast<const float*>(map.scale), I};
}
template <class T>
Int4 matrix(const Map<T>& map, i64 I, Int4*) {
    return {static_cast<const uint8_t*>(map.w), static_cast<const bf16*>(map.scale), I};
}

template <class Matrix, class T>
void linears(const Map<T>* maps, i64 count, const T* x, i64 M, i64 I) {
    const Inputs<Matrix> inputs(x, M, I, I);
    i64 all = 0, bytes = 0;
    for (i64 k = 0; k < count; ++k) {
        all += maps[k].O;
        bytes += maps[k].O * matrix(maps[k], I, static_cast<Matrix*>(nullptr)).bytes();
    }
#pragma omp parallel if (bytes >= SMALL)
    {
        const Share mine(all, omp_get_thread_num(), omp_get_num_threads());
        std::vector<float> made;
        i64 before = 0;
        for (i64 k = 0; k < count; ++k) {
            const Map<T>& map = maps[k];
            const i64 from = std::max(mine.from - before, i64(0));
            const i64 to = std::min(mine.to - before, map.O);
            if (from < to) {
                const Matrix w = matrix(map, I, static_cast<Matrix*>(nullptr));
                const i64 width = to - from;
                made.resize(size_t(M * width));
                w.rows(inputs.of.data(), M, from, to, {made.data(), width, from});
                for (i64 m = 0; m < M; ++m)
                    for (i64 i = 0, o = from; o < to; ++i, ++o) {
                        const float y = made[size_t(m * width + i)];
                        narrow(map.b ? y + widen(map.b[o]) : y, map.y + m * map.O + o);
                    }
            }
            before += map.O;
        }
    }
}

}  // namespace

#define QUINTET_LINEAR(name, Matrix, T)                                                       \
    extern "C" void quintet_linear_##name(const Map<T>* maps, i64 count, const T* x, i64 M, i64 I) { \
        linears<Matrix>(maps, count, x, M, I);                                                \
    }
QUINTET_LINEAR(bf16, Plain<bf16>, bf16)
QUINTET_LINEAR(f32, Plain<float>, float)
QUINTET_LINEAR(int8_bf16, Int8, bf16)
QUINTET_LINEAR(int8_f32, Int8, float)
QUINTET_LINEAR(int4_bf16, Int4, bf16)
QUINTET_LINEAR(int4_f32, Int4, float)
