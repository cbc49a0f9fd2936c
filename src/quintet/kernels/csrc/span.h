// Memory that a caller lends, and how much of it there is.
//
// A call comes as eight-byte fields that Python fills in (quintet/kernels/calls.py). What it is going
// to touch is compared with what it was lent before it runs, and a call that does not fit is refused.
#pragma once
#include <initializer_list>
#include <tuple>

#include "simd.h"

namespace quintet {

// How many there are along an axis, and how far apart.
struct Axis {
    i64 n, step;
};

// How far it is from the first of all elements to the end of the last; negative where there is no
// such block.
inline i64 reach(std::initializer_list<Axis> axes) {
    i64 last = 0;
    bool none = false;
    for (const Axis& axis : axes) {
        if (axis.n < 0 || axis.step < 0) return -1;
        none |= axis.n == 0;
        last += (axis.n - 1) * axis.step;
    }
    return none ? 0 : last + 1;
}

template <class T>
struct Span {
    T* p;
    i64 bytes;

    operator T*() const { return p; }
    // Whether there is one at all: what has bytes and lies nowhere is one, and holds nothing.
    bool given() const { return p || bytes; }
    bool holds(i64 n) const { return n == 0 || (p && n > 0 && n <= bytes / i64(sizeof(T))); }
    bool holds(std::initializer_list<Axis> axes) const { return holds(reach(axes)); }
};

// What is of one type or another.
template <>
struct Span<const void> {
    const void* p;
    i64 bytes;

    bool given() const { return p || bytes; }
    template <class T>
    Span<const T> as() const { return {static_cast<const T*>(p), bytes}; }
};

// Memory of a kernel's own, of which it knows how much there is.
template <class T>
Span<T> own(T* p) {
    return {p, INT64_MAX};
}

// Run a call, of which `bytes` were given; 1 if it is refused.
template <class Call, class Fn>
i64 enter(const void* fields, i64 bytes, Fn&& run) {
    if (bytes < i64(sizeof(Call))) return 1;
    const Call& call = *static_cast<const Call*>(fields);
    if (bytes != call.size() || !call.fits()) return 1;
    run(call);
    return 0;
}

// What follows the fields of a call, as many as it says.
template <class T, class Call>
const T* behind(const Call* call) {
    return reinterpret_cast<const T*>(call + 1);
}

}  // namespace quintet

// `run` of `Call` as a function that Python finds.
#define QUINTET_ENTRY(name, Call, ...)                                            \
    extern "C" __attribute__((visibility("default"))) int64_t quintet_##name(const void* fields, int64_t bytes) { \
        return enter<Call>(fields, bytes, [](const Call& c) { __VA_ARGS__(c); }); \
    }

// All fields of a struct in their order, inside of it: what Python writes is compared with them when the
// library is loaded (layout.cpp), and that none is missing when it is compiled.
#define QUINTET_FIELDS(...)                                \
    auto fields() const { return std::tie(__VA_ARGS__); } \
    static const char* names() { return #__VA_ARGS__; }
