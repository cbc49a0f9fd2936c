// Matrices of 8-bit integers with a scale for each row.
#pragma once
#include "integers.h"

namespace quintet {

// q (O, I) with a scale for each row.
struct Int8 {
    using Input = Rounded;
    using Stored = int8_t;
    using Scale = float;
    const int8_t* q;
    const float* scale;
    i64 I;

    i64 bytes() const { return I; }
    static Bytes bytes(i64 O, i64 I, i64) { return {O * I, O * i64(sizeof(float))}; }

    void rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const;
};

template <>
struct Inputs<Int8> : QuantizedInputs {
    using QuantizedInputs::QuantizedInputs;
};

}  // namespace quintet
