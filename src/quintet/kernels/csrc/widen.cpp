// Quantised matrices as bfloat16 or float32, for products of many vectors.
#include <omp.h>

#include "integers.h"

namespace {

template <class T>
void widen_int8(const int8_t* q, const float* scale, T* to, i64 rows, i64 I) {
#pragma omp parallel for if (rows * I >= SMALL) schedule(static)
    for (i64 o = 0; o < rows; ++o) {
        const F by = all(scale[o]);
        const int8_t* p = q + o * I;
        T* y = to + o * I;
        i64 i = 0;
        for (; i + LANES <= I; i += LANES) store(y + i, mul(load_bytes(p + i), by));
        for (; i < I; ++i) narrow(float(p[i]) * scale[o], y + i);
    }
}

template <class T>
void widen_int4(const uint8_t* q, const bf16* scale, T* to, i64 rows, i64 I) {
    const i64 G = (I + GROUP - 1) / GROUP;
#pragma omp parallel for if (rows * I >= SMALL) schedule(static)
    for (i64 o = 0; o < rows; ++o)
        for (i64 g = 0; g < G; ++g) {
            const uint8_t* p = q + (o * G + g) * (GROUP / 2);
            const float by = widen(scale[o * G + g]);
            T* y = to + o * I + g * GROUP;
            const i64 n = std::min(GROUP, I - g * GROUP);
            if (n == GROUP) {
                for (i64 j = 0; j < GROUP / 2; j += LANES) {
                    store(y + j, mul(load_low(p + j), all(by)));
                    store(y + GROUP / 2 + j, mul(load_high(p + j), all(by)));
                }
                continue;
            }
            for (i64 j = 0; j < n; ++j) {
                const int level = j < GROUP / 2 ? p[j] & 15 : p[j - GROUP / 2] >> 4;
                narrow(float(level - 8) * by, y + j);
            }
        }
}

}  // namespace

extern "C" {
void quintet_widen_int8_bf16(const int8_t* q, const float* scale, bf16* to, i64 rows, i64 I) {
    widen_int8(q, scale, to, rows, I);
}
void quintet_widen_int8_f32(const int8_t* q, const float* scale, float* to, i64 rows, i64 I) {
    widen_int8(q, scale, to, rows, I);
}
void quintet_widen_int4_bf16(const uint8_t* q, const bf16* scale, bf16* to, i64 rows, i64 I) {
    widen_int4(q, scale, to, rows, I);
}
void quintet_widen_int4_f32(const uint8_t* q, const bf16* scale, float* to, i64 rows, i64 I) {
    widen_int4(q, scale, to, rows, I);
}
}
