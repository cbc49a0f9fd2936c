// What the parts of a stack have in common. A part is x += part(norm(x)), run by a team of threads;
// every field that Python fills in takes eight bytes.
#pragma once
#include "../linear.h"
#include "../rows.h"

namespace {

struct Weight {
    const void *w, *scale, *bias;
    i64 O, stride;
};

struct Norm {
    const void* weight;
    double eps;
};

// The tokens of a step.
struct Tokens {
    void* x;                // (B, T, C), in and out
    const void *cos, *sin;  // (B or 1, T, D)
    const i64* starts;      // (B) the slot of each row's first token
    const i64* counts;      // (B) how many of a row's tokens are real; null where all are
    i64 angle_row, B, T, C;

    i64 all() const { return B * T; }
};

// Memory that the threads of a team share, of which each takes the same pieces in the same order.
// Without any it counts how much that is.
class Room {
  public:
    explicit Room(char* memory) : memory_(memory) {}

    template <class T>
    T* take(i64 n) {
        T* piece = reinterpret_cast<T*>(memory_ + used_);
        used_ += (size_t(n) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    size_t used() const { return used_; }

  private:
    char* memory_;
    size_t used_ = 0;
};

template <class T>
Map<T> map_of(const Weight& w, T* y) {
    return {w.w, w.scale, static_cast<const T*>(w.bias), y, w.O, w.stride};
}

template <class Matrix, class T>
Matrix matrix_of(const Weight& w, i64 I) {
    return matrix(map_of<T>(w, nullptr), I, static_cast<Matrix*>(nullptr));
}

// One thread of the team that runs a stack.
template <class Matrix, class T>
struct Member {
    const Tokens& s;
    const i64 thread, threads;
    std::vector<float> made;  // room to work in

    T* x() const { return static_cast<T*>(s.x); }
    Share share(i64 n) const { return Share(n, thread, threads); }

    // The rows that are this thread's of several maps of the same vectors.
    void map(const Map<T>* maps, i64 count, const Inputs<Matrix>& inputs, i64 I) {
        map_rows<Matrix>(maps, count, inputs.of.data(), s.all(), I, thread, threads, made);
    }

    // x += y, of the columns that are this thread's.
    void add(const T* y) const {
        const Share mine = share(s.C);
        for (i64 m = 0; m < s.all(); ++m)
            for (i64 i = m * s.C + mine.from; i < m * s.C + mine.to; ++i)
                narrow(widen(x()[i]) + widen(y[i]), x() + i);
    }

    // x += W of `inputs`, with `added` (B, T, C) as room; all see it behind this.
    void add(const Weight& w, const Inputs<Matrix>& inputs, i64 I, T* added) {
        const Map<T> to = map_of(w, added);
        map(&to, 1, inputs, I);
        add(added);
#pragma omp barrier
    }
};

// norm(x) as matrices multiply it, which a thread makes for itself without waiting for the others.
template <class Matrix, class T>
struct Normed {
    std::vector<T> rows;
    Inputs<Matrix> inputs;

    Normed(const Member<Matrix, T>& me, const Norm& norm)
        : rows(size_t(me.s.all() * me.s.C)), inputs(me.s.all(), me.s.C) {
        const i64 C = me.s.C;
        for (i64 m = 0; m < me.s.all(); ++m)
            normalise(me.x() + m * C, static_cast<const T*>(norm.weight), rows.data() + m * C, C,
                      float(norm.eps));
        inputs.fill(rows.data(), me.s.all(), C, 0, 1);
    }
};

}  // namespace
