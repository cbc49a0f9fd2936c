// Matrices of 4-bit integers in groups of 64 with a scale each.
#pragma once
#include "integers.h"

namespace quintet {

// Groups of 64 along each row, 32 bytes a group: byte j has number j + 8 low and j + 32 high; a
// scale for each group.
struct Int4 {
    using Input = Rounded;
    using Stored = uint8_t;
    using Scale = bf16;
    const uint8_t* q;
    const bf16* scale;
    i64 I;

    i64 groups() const { return (I + GROUP - 1) / GROUP; }
    i64 bytes() const { return groups() * (GROUP / 2 + 2); }
    static Bytes bytes(i64 O, i64 I, i64) {
        const i64 G = O * ((I + GROUP - 1) / GROUP);
        return {G * (GROUP / 2), G * i64(sizeof(bf16))};
    }

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const;
};

template <>
struct Inputs<Int4> : QuantizedInputs {
    using QuantizedInputs::QuantizedInputs;
};

}  // namespace quintet
