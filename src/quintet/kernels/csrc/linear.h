// y = W x + b of few vectors, by parts of all rows of several W.
#pragma once
#include "integers.h"

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

// The rows of several maps of M vectors that are this thread's; `made` is room to work in.
template <class Matrix, class T>
void map_rows(const Map<T>* maps, i64 count, const typename Matrix::Input* x, i64 M, i64 I,
              i64 thread, i64 threads, std::vector<float>& made) {
    i64 all = 0, before = 0;
    for (i64 k = 0; k < count; ++k) all += maps[k].O;
    const Share mine(all, thread, threads);
    for (i64 k = 0; k < count; ++k) {
        const Map<T>& map = maps[k];
        const i64 from = std::max(mine.from - before, i64(0));
        const i64 to = std::min(mine.to - before, map.O);
        if (from < to) {
            const i64 width = to - from;
            made.resize(size_t(M * width));
            matrix(map, I, static_cast<Matrix*>(nullptr)).rows(x, M, from, to, {made.data(), width, from});
            for (i64 m = 0; m < M; ++m)
                for (i64 i = 0, o = from; o < to; ++i, ++o) {
                    const float y = made[size_t(m * width + i)];
                    narrow(map.b ? y + widen(map.b[o]) : y, map.y + m * map.O + o);
                }
        }
        before += map.O;
    }
}

}  // namespace
