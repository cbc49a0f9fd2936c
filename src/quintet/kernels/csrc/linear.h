// y = W x + b of few vectors, by parts of all rows of several W.
#pragma once
#include "groups.h"
#include "rows.h"

namespace quintet {

// W (O, I) and b (O) or null. The stride is how far rows of numbers are apart, or the layout of groups.
struct Weight {
    QUINTET_FIELDS(w, stride, scale, offset, bias, O)
    Span<const void> w;
    i64 stride;
    Span<const void> scale, offset, bias;
    i64 O;

    template <class Matrix, class T>
    bool fits(i64 I) const {
        if (O <= 0 || I <= 0) return false;
        const Bytes bytes = Matrix::bytes(O, I, stride);
        return bytes.within(w, scale) && (!offset.given() || offset.as<char>().holds(bytes.scale)) &&
               (!bias.given() || bias.as<T>().holds(O));
    }
};

// A weight and where its products go, y (M, O).
template <class T>
struct Map {
    Weight weight;
    T* y;

    i64 O() const { return weight.O; }
    const T* bias() const { return weight.bias.template as<T>(); }
};

template <class T>
Plain<T> matrix(const Map<T>& map, i64 I, Plain<T>*) {
    return {map.weight.w.template as<T>(), I, map.weight.stride};
}
template <class T>
Int8 matrix(const Map<T>& map, i64 I, Int8*) {
    return {map.weight.w.template as<int8_t>(), map.weight.scale.template as<float>(), I};
}
template <class T>
Int4 matrix(const Map<T>& map, i64 I, Int4*) {
    return {map.weight.w.template as<uint8_t>(), map.weight.scale.template as<bf16>(), I};
}

template <class T>
Groups matrix(const Map<T>& map, i64 I, Groups*) {
    const Weight& w = map.weight;
    return {w.w.template as<char>(), w.scale.template as<char>(), w.offset.template as<char>(), I, Layout(w.stride)};
}

// The rows of several maps of M vectors that are this thread's; `made` is room to work in.
template <class Matrix, class T>
void map_rows(const Map<T>* maps, i64 count, const typename Matrix::Input* x, i64 M, i64 I,
              i64 thread, i64 threads, std::vector<float>& made) {
    i64 all = 0, before = 0;
    for (i64 k = 0; k < count; ++k) all += maps[k].O();
    const Share mine(all, thread, threads);
    for (i64 k = 0; k < count; ++k) {
        const Map<T>& map = maps[k];
        const i64 from = std::max(mine.from - before, i64(0));
        const i64 to = std::min(mine.to - before, map.O());
        if (from < to) {
            const i64 width = to - from;
            const T* bias = map.bias();
            made.resize(size_t(M * width));
            matrix(map, I, static_cast<Matrix*>(nullptr)).rows(x, M, from, to, {made.data(), width, from});
            for (i64 m = 0; m < M; ++m) {
                const float* sums = made.data() + m * width;
                T* y = map.y + m * map.O() + from;
                each_vector<T>(width, [&](i64 i, auto last) {
                    const F sum = get(sums, i, width, last);
                    set(y, i, width, bias ? add(sum, get(bias + from, i, width, last)) : sum, last);
                });
            }
        }
        before += map.O();
    }
}

}  // namespace quintet
