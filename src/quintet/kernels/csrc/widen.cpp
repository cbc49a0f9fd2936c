// Quantised matrices as bfloat16 or float32, for products of many vectors.
#include <omp.h>

#include "integers.h"

namespace {

template <class Matrix, class T>
struct Call {
    i64 rows, I;
    Span<const void> q, scale;
    Span<T> y;  // (rows, I)

    i64 size() const { return sizeof(Call); }
    bool fits() const {
        return rows >= 0 && I > 0 && Matrix::bytes(rows, I, I).within(q, scale) && y.holds(rows * I);
    }
};

template <class T>
void widen_int8(const Call<Int8, T>& c) {
    const i64 rows = c.rows, I = c.I;
    const int8_t* q = c.q.template as<int8_t>();
    const float* scale = c.scale.template as<float>();
    T* to = c.y;
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
void widen_int4(const Call<Int4, T>& c) {
    const i64 rows = c.rows, I = c.I;
    const uint8_t* q = c.q.template as<uint8_t>();
    const bf16* scale = c.scale.template as<bf16>();
    T* to = c.y;
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

#define QUINTET_WIDEN(name, Matrix, T, run) \
    using Call_##name = Call<Matrix, T>;    \
    QUINTET_ENTRY(widen_##name, Call_##name, run)
QUINTET_WIDEN(int8_bf16, Int8, bf16, widen_int8)
QUINTET_WIDEN(int8_f32, Int8, float, widen_int8)
QUINTET_WIDEN(int4_bf16, Int4, bf16, widen_int4)
QUINTET_WIDEN(int4_f32, Int4, float, widen_int4)
