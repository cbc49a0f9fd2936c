// y = W x + b for several W of the same few vectors x.
#include <omp.h>

#include "linear.h"

namespace {

template <class Matrix, class T>
void linears(const Map<T>* maps, i64 count, const T* x, i64 M, i64 I) {
    const Inputs<Matrix> inputs(x, M, I, I);
    i64 bytes = 0;
    for (i64 k = 0; k < count; ++k)
        bytes += maps[k].O * matrix(maps[k], I, static_cast<Matrix*>(nullptr)).bytes();
#pragma omp parallel if (bytes >= SMALL)
    {
        std::vector<float> made;
        map_rows<Matrix>(maps, count, inputs.of.data(), M, I, omp_get_thread_num(),
                         omp_get_num_threads(), made);
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
