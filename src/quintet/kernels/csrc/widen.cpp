// Quantised matrices as bfloat16 or float32, for products of many vectors.
#include <omp.h>

#include "groups.h"

using namespace quintet;

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

template <class T>
struct GroupsCall {
    i64 rows, I, layout;
    Span<const void> q, scale, offset;
    Span<T> y;  // (rows, I)

    i64 size() const { return sizeof(GroupsCall); }
    bool fits() const {
        if (rows < 0 || I <= 0) return false;
        const Bytes bytes = Groups::bytes(rows, I, layout);
        return bytes.within(q, scale) && (!offset.given() || offset.as<char>().holds(bytes.scale)) && y.holds(rows * I);
    }
};

#if defined(__AVX512F__)
inline F load_words(const int16_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#else
inline F load_words(const int16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#endif
// A product that is rounded before anything is added to it, whatever the compiler would like.
inline F by_itself(F x) {
    asm volatile("" : "+v"(x));
    return x;
}

template <Numbers N, class T>
void widen_row(const Layout& layout, const char* p, const float* scale, const float* offset, i64 I, T* y) {
    constexpr i64 STEP = N == BYTES ? GROUP : GROUP / 2;
    const F middle = all(N == NIBBLES && !offset ? 8.0f : 0.0f);
    for (i64 i = 0; i < I; i += GROUP, p += STEP) {
        const i64 n = std::min(GROUP, I - i);
        alignas(64) char rest[GROUP] = {};
        if (N == BYTES && n < GROUP) std::memcpy(rest, p, size_t(n));
        const Wide w = widened<N>(N == BYTES && n < GROUP ? rest : p);
        alignas(64) int16_t numbers[GROUP];
        std::memcpy(numbers, w.parts, sizeof(numbers));
        for (i64 j = 0; j < n; j += LANES) {
            const i64 g = (i + j) / layout.group;
            F x = mul(sub(load_words(numbers + j), middle), all(scale[g]));
            if (offset) x = add(by_itself(x), all(offset[g]));
            if (n - j >= LANES) store(y + i + j, x);
            else store(y + i + j, x, n - j);
        }
    }
}

template <class T>
void widen_groups(const GroupsCall<T>& c) {
    const Layout layout(c.layout);
    const i64 G = layout.groups(c.I);
    const char *q = c.q.template as<char>(), *scale = c.scale.template as<char>(), *offset = c.offset.template as<char>();
#pragma omp parallel if (c.rows * c.I >= SMALL)
    {
        std::vector<float> scales(size_t(G + LANES)), offsets(size_t(G + LANES));
        const auto reals = [&](const char* from, i64 o, std::vector<float>& to) {
            for (i64 g = 0; g < G; g += LANES)
                store(to.data() + g, load_reals(from, layout.real, o * G + g, std::min<i64>(LANES, G - g)));
        };
#pragma omp for schedule(static)
        for (i64 o = 0; o < c.rows; ++o) {
            reals(scale, o, scales);
            if (offset) reals(offset, o, offsets);
            const char* p = q + o * layout.row_bytes(c.I);
            const float* more = offset ? offsets.data() : nullptr;
            T* y = c.y + o * c.I;
            if (layout.numbers == BYTES) widen_row<BYTES>(layout, p, scales.data(), more, c.I, y);
            else if (layout.numbers == NIBBLES) widen_row<NIBBLES>(layout, p, scales.data(), more, c.I, y);
            else widen_row<IQ4>(layout, p, scales.data(), more, c.I, y);
        }
    }
}

}  // namespace

using Widen_groups_bf16 = GroupsCall<bf16>;
using Widen_groups_f32 = GroupsCall<float>;
QUINTET_ENTRY(widen_groups_bf16, Widen_groups_bf16, widen_groups)
QUINTET_ENTRY(widen_groups_f32, Widen_groups_f32, widen_groups)
#define QUINTET_WIDEN(name, Matrix, T, run) \
    using Call_##name = Call<Matrix, T>;    \
    QUINTET_ENTRY(widen_##name, Call_##name, run)
QUINTET_WIDEN(int8_bf16, Int8, bf16, widen_int8)
QUINTET_WIDEN(int8_f32, Int8, float, widen_int8)
QUINTET_WIDEN(int4_bf16, Int4, bf16, widen_int4)
QUINTET_WIDEN(int4_f32, Int4, float, widen_int4)
