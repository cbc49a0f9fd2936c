// The blocks of GGUF files, taken apart: w = n * scale, or n * scale + offset (quintet/ops/blocks.py).
#include <omp.h>

#include "span.h"

using namespace quintet;

namespace {

// Whatever the processor does with subnormal floats: half of all scales in files are subnormal halves.
inline float half(const uint8_t* p) {
    const uint32_t bits = uint32_t(p[0]) | uint32_t(p[1]) << 8;
    const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
    if (exponent == 0) {
        const float value = float(rest) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    // An infinity and what is no number stay what they are.
    const uint32_t wide = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

constexpr int8_t TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// One block: its numbers, from 0 on where they are to be packed, and the scales and offsets of its groups.
struct Taken {
    int8_t n[256];
    float scale[16], offset[16];
};

// WEIGHTS a block of BYTES; GROUP of them share a scale. Numbers of 4 bits stand for n - ZERO, or for a
// place in the table. Scales are halves as they are in the file where ONE says so.
template <int W, int B, int G, bool FOUR, bool OFFSET, bool IN_TABLE, bool ONE>
struct Type {
    static constexpr int WEIGHTS = W, BYTES = B, GROUP = G, GROUPS = W / G;
    static constexpr bool PACKED = FOUR, OFFSETS = OFFSET, PLACES = IN_TABLE, HALVES = ONE;
    static constexpr int ZERO = FOUR && !OFFSET && !IN_TABLE ? 8 : 0;
};

template <int COUNT>
inline void nibbles(const uint8_t* __restrict q, int8_t* __restrict n) {
    for (int j = 0; j < COUNT; ++j) n[j] = int8_t(q[j] & 15);
    for (int j = 0; j < COUNT; ++j) n[COUNT + j] = int8_t(q[j] >> 4);
}

struct Q4_0 : Type<32, 18, 32, true, false, false, true> {
    static void take(const uint8_t* b, Taken& to) {
        to.scale[0] = half(b);
        nibbles<16>(b + 2, to.n);
    }
};

struct Q4_1 : Type<32, 20, 32, true, true, false, true> {
    static void take(const uint8_t* b, Taken& to) {
        to.scale[0] = half(b);
        to.offset[0] = half(b + 2);
        nibbles<16>(b + 4, to.n);
    }
};

inline void fifth_bits(const uint8_t* __restrict high, int8_t* __restrict n) {
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 8; ++j) n[8 * i + j] = int8_t(n[8 * i + j] | (high[i] >> j & 1) << 4);
}

struct Q5_0 : Type<32, 22, 32, false, false, false, true> {
    static void take(const uint8_t* b, Taken& to) {
        to.scale[0] = half(b);
        nibbles<16>(b + 6, to.n);
        fifth_bits(b + 2, to.n);
        for (int j = 0; j < 32; ++j) to.n[j] = int8_t(to.n[j] - 16);
    }
};

struct Q5_1 : Type<32, 24, 32, false, true, false, true> {
    static void take(const uint8_t* b, Taken& to) {
        to.scale[0] = half(b);
        to.offset[0] = half(b + 2);
        nibbles<16>(b + 8, to.n);
        fifth_bits(b + 4, to.n);
    }
};

struct Q8_0 : Type<32, 34, 32, false, false, false, true> {
    static void take(const uint8_t* b, Taken& to) {
        to.scale[0] = half(b);
        std::memcpy(to.n, b + 2, 32);
    }
};

// Bits 2k of 32 bytes are those of weights 32k on, for each half of a block.
inline void quarters(const uint8_t* q, int8_t* n) {
    for (int h = 0; h < 2; ++h)
        for (int k = 0; k < 4; ++k)
            for (int j = 0; j < 32; ++j) n[h * 128 + k * 32 + j] = int8_t(q[h * 32 + j] >> 2 * k & 3);
}

struct Q2_K : Type<256, 84, 16, false, true, false, false> {
    static void take(const uint8_t* b, Taken& to) {
        const float d = half(b + 80), m = half(b + 82);
        for (int g = 0; g < 16; ++g) {
            to.scale[g] = d * float(b[g] & 15);
            to.offset[g] = -(m * float(b[g] >> 4));
        }
        quarters(b + 16, to.n);
    }
};

struct Q3_K : Type<256, 110, 16, false, false, false, false> {
    static void take(const uint8_t* b, Taken& to) {
        const float d = half(b + 108);
        const uint8_t* s = b + 96;
        for (int g = 0; g < 16; ++g) {
            const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = s[8 + g % 4] >> 2 * (g / 4) & 3;
            to.scale[g] = d * float((low | high << 4) - 32);
        }
        quarters(b + 32, to.n);
        for (int k = 0; k < 8; ++k)
            for (int j = 0; j < 32; ++j) {
                int8_t& n = to.n[32 * k + j];
                n = int8_t((n | (b[j] >> k & 1) << 2) - 4);
            }
    }
};

// Eight scales and offsets of 6 bits, in twelve bytes behind the two halves.
inline void sixes(const uint8_t* b, Taken& to) {
    const float d = half(b), m = half(b + 2);
    const uint8_t *a = b + 4, *c = b + 8, *e = b + 12;
    for (int k = 0; k < 4; ++k) {
        to.scale[k] = d * float(a[k] & 63);
        to.offset[k] = -(m * float(c[k] & 63));
        to.scale[4 + k] = d * float((e[k] & 15) | a[k] >> 6 << 4);
        to.offset[4 + k] = -(m * float(e[k] >> 4 | c[k] >> 6 << 4));
    }
}

struct Q4_K : Type<256, 144, 32, true, true, false, false> {
    static void take(const uint8_t* b, Taken& to) {
        sixes(b, to);
        for (int k = 0; k < 4; ++k) nibbles<32>(b + 16 + 32 * k, to.n + 64 * k);
    }
};

struct Q5_K : Type<256, 176, 32, false, true, false, false> {
    static void take(const uint8_t* b, Taken& to) {
        sixes(b, to);
        for (int k = 0; k < 4; ++k) nibbles<32>(b + 48 + 32 * k, to.n + 64 * k);
        for (int k = 0; k < 8; ++k)
            for (int j = 0; j < 32; ++j) {
                int8_t& n = to.n[32 * k + j];
                n = int8_t(n | (b[16 + j] >> k & 1) << 4);
            }
    }
};

struct Q6_K : Type<256, 210, 16, false, false, false, false> {
    static void take(const uint8_t* b, Taken& to) {
        const float d = half(b + 208);
        for (int g = 0; g < 16; ++g) to.scale[g] = d * float(int8_t(b[192 + g]));
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 4; ++k)
                for (int j = 0; j < 32; ++j) {
                    const uint8_t low = uint8_t(b[64 * h + 32 * (k % 2) + j] >> 4 * (k / 2)) & 15;
                    const int high = b[128 + 32 * h + j] >> 2 * k & 3;
                    to.n[128 * h + 32 * k + j] = int8_t((low | high << 4) - 32);
                }
    }
};

struct IQ4_NL : Type<32, 18, 32, true, false, true, true> {
    static void take(const uint8_t* b, Taken& to) { Q4_0::take(b, to); }
};

struct IQ4_XS : Type<256, 136, 32, true, false, true, false> {
    static void take(const uint8_t* b, Taken& to) {
        const float d = half(b);
        const int high = b[2] | b[3] << 8;
        for (int k = 0; k < 8; ++k) {
            const int low = b[4 + k / 2] >> 4 * (k % 2) & 15;
            to.scale[k] = d * float((low | (high >> 2 * k & 3) << 4) - 32);
            nibbles<16>(b + 8 + 16 * k, to.n + 32 * k);
        }
    }
};

// In rows of I weights.
template <class Kind, class T>
struct Decode {
    i64 rows, I;
    Span<const uint8_t> raw;
    Span<T> y;  // (rows, I)

    i64 size() const { return sizeof(Decode); }
    bool fits() const {
        if (rows < 0 || I <= 0 || I % Kind::WEIGHTS) return false;
        return raw.holds(rows * (I / Kind::WEIGHTS) * Kind::BYTES) && y.holds(rows * I);
    }
};

template <class Kind, class T>
void decode(const Decode<Kind, T>& c) {
    const i64 blocks = c.I / Kind::WEIGHTS, rows = c.rows;
    const uint8_t* raw = c.raw;
    T* to = c.y;
#pragma omp parallel for schedule(static)
    for (i64 at = 0; at < rows; ++at)
        for (i64 i = 0; i < blocks; ++i) {
            Taken taken;
            Kind::take(raw + (at * blocks + i) * Kind::BYTES, taken);
            T* y = to + (at * blocks + i) * Kind::WEIGHTS;
            for (int g = 0; g < Kind::GROUPS; ++g) {
                const float scale = taken.scale[g];
                float made[Kind::GROUP];
                for (int j = 0; j < Kind::GROUP; ++j) {
                    const int8_t n = taken.n[g * Kind::GROUP + j];
                    made[j] = float(Kind::PLACES ? TABLE[n] : n - Kind::ZERO) * scale;
                }
                // The product is exact where there is an offset: fused with it or not is one.
                if constexpr (Kind::OFFSETS)
                    for (int j = 0; j < Kind::GROUP; ++j) made[j] += taken.offset[g];
                for (int j = 0; j < Kind::GROUP; j += LANES) store(y + g * Kind::GROUP + j, load(made + j));
            }
        }
}

// In our groups: numbers int8 (rows, I), or two a byte; scales and offsets of each group.
template <class Kind>
struct Part {
    using Scale = std::conditional_t<Kind::HALVES, uint16_t, float>;
    i64 rows, I;
    Span<const uint8_t> raw;
    Span<uint8_t> numbers;
    Span<Scale> scale, offset;

    i64 width() const { return Kind::PACKED ? (I + 63) / 64 * 32 : I; }
    i64 size() const { return sizeof(Part); }
    bool fits() const {
        if (rows < 0 || I <= 0 || I % Kind::WEIGHTS) return false;
        const i64 groups = rows * (I / Kind::GROUP);
        return raw.holds(rows * (I / Kind::WEIGHTS) * Kind::BYTES) && numbers.holds(rows * width()) &&
               scale.holds(groups) && (!Kind::OFFSETS || offset.holds(groups));
    }
};

template <class Kind>
void part(const Part<Kind>& c) {
    const i64 blocks = c.I / Kind::WEIGHTS, groups = c.I / Kind::GROUP, width = c.width(), rows = c.rows;
    const uint8_t* raw = c.raw;
    uint8_t* numbers = c.numbers;
    auto *scale = c.scale.p, *offset = c.offset.p;
#pragma omp parallel for schedule(static)
    for (i64 at = 0; at < rows; ++at) {
        uint8_t* row = numbers + at * width;
        for (i64 i = 0; i < blocks; ++i) {
            const uint8_t* b = raw + (at * blocks + i) * Kind::BYTES;
            Taken taken;
            Kind::take(b, taken);
            const i64 first = at * groups + i * Kind::GROUPS;
            if constexpr (Kind::HALVES) {
                std::memcpy(scale + first, b, 2);
                if constexpr (Kind::OFFSETS) std::memcpy(offset + first, b + 2, 2);
            } else {
                std::memcpy(scale + first, taken.scale, sizeof(float) * Kind::GROUPS);
                if constexpr (Kind::OFFSETS)
                    std::memcpy(offset + first, taken.offset, sizeof(float) * Kind::GROUPS);
            }
            const i64 start = i * Kind::WEIGHTS;
            if constexpr (!Kind::PACKED) {
                std::memcpy(row + start, taken.n, Kind::WEIGHTS);
            } else if constexpr (Kind::WEIGHTS == 32) {
                // One half of 64 neighbours; the other one comes next, or not at all.
                uint8_t* to = row + start / 64 * 32;
                if (start % 64)
                    for (int j = 0; j < 32; ++j) to[j] = uint8_t(to[j] | taken.n[j] << 4);
                else
                    std::memcpy(to, taken.n, 32);
            } else {
                for (int k = 0; k < Kind::WEIGHTS / 64; ++k)
                    for (int j = 0; j < 32; ++j)
                        row[start / 2 + 32 * k + j] =
                            uint8_t(taken.n[64 * k + j] | taken.n[64 * k + 32 + j] << 4);
            }
        }
    }
}

}  // namespace

#define QUINTET_BLOCKS(name, Kind)                             \
    using Wide_##name = Decode<Kind, float>;                   \
    using Short_##name = Decode<Kind, bf16>;                   \
    using Part_##name = Part<Kind>;                            \
    QUINTET_ENTRY(blocks_##name##_f32, Wide_##name, decode)    \
    QUINTET_ENTRY(blocks_##name##_bf16, Short_##name, decode)  \
    QUINTET_ENTRY(parts_of_##name, Part_##name, part)
QUINTET_BLOCKS(q4_0, Q4_0)
QUINTET_BLOCKS(q4_1, Q4_1)
QUINTET_BLOCKS(q5_0, Q5_0)
QUINTET_BLOCKS(q5_1, Q5_1)
QUINTET_BLOCKS(q8_0, Q8_0)
QUINTET_BLOCKS(q2_k, Q2_K)
QUINTET_BLOCKS(q3_k, Q3_K)
QUINTET_BLOCKS(q4_k, Q4_K)
QUINTET_BLOCKS(q5_k, Q5_K)
QUINTET_BLOCKS(q6_k, Q6_K)
QUINTET_BLOCKS(iq4_nl, IQ4_NL)
QUINTET_BLOCKS(iq4_xs, IQ4_XS)
