// y = W x + b for several W of the same few vectors x, as a call.
#pragma once
#include <omp.h>

#include "linear.h"

namespace quintet {

template <class Matrix, class T>
struct LinearCall {
    struct Out {
        Weight weight;
        Span<T> y;  // (M, O)
    };
    i64 M, I, count;
    Span<const T> x;  // (M, I)

    const Out* outs() const { return behind<Out>(this); }
    i64 size() const { return i64(sizeof(LinearCall)) + count * i64(sizeof(Out)); }
    bool fits() const {
        return M > 0 && I > 0 && x.holds(M * I) && std::all_of(outs(), outs() + count, [this](const Out& out) {
                   return out.weight.template fits<Matrix, T>(I) && out.y.holds(M * out.weight.O);
               });
    }
};

template <class Matrix, class T>
void linears(const LinearCall<Matrix, T>& c) {
    const Inputs<Matrix> inputs(c.x.p, c.M, c.I, c.I);
    std::vector<Map<T>> maps;
    i64 bytes = 0;
    for (i64 k = 0; k < c.count; ++k) {
        maps.push_back({c.outs()[k].weight, c.outs()[k].y});
        bytes += maps.back().O() * matrix(maps.back(), c.I, static_cast<Matrix*>(nullptr)).bytes();
    }
#pragma omp parallel if (bytes >= SMALL)
    {
        std::vector<float> made;
        map_rows<Matrix>(maps.data(), c.count, inputs.of.data(), c.M, c.I, omp_get_thread_num(),
                         omp_get_num_threads(), made);
    }
}

}  // namespace quintet

#define QUINTET_LINEAR(name, Matrix, T)           \
    using Linear_##name = LinearCall<Matrix, T>;  \
    QUINTET_ENTRY(linear_##name, Linear_##name, linears)
