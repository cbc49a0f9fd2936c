// What the parts of a stack have in common. A part is x += part(norm(x)), run by a team of threads. It
// says of the fields that Python filled in whether they fit each other and the tokens.
#pragma once
#include "../linear.h"
#include "../shared_buffer.h"
#include "../rows.h"
#include "../sequences.h"

namespace quintet {

// What is normalised: x, what lies beside it, their sum, or x with the embeddings behind it, 2C wide.
enum Source : i64 { HIDDEN, BESIDE, SUM, WITH_EMBEDS };

struct Norm {
    QUINTET_FIELDS(weight, eps, of)
    Span<const void> weight;
    double eps;
    Source of;

    // How wide what is normalised is, for hidden states (M, C).
    i64 width(i64 C) const { return of == WITH_EMBEDS ? 2 * C : C; }
    template <class T>
    const T* scale() const { return weight.as<T>(); }
    template <class T>
    bool fits(i64 C) const {
        return weight.as<T>().holds(width(C)) && HIDDEN <= of && of <= WITH_EMBEDS;
    }
};

// The tokens of a step, those of one sequence behind those of another.
struct Tokens {
    void* x;                // (M, C), in and out
    const void* embeds;     // the same
    void* beside;           // the same, what a part leaves to the next ones
    const void *cos, *sin;  // (angles, D), of all tokens or of those of each sequence
    i64 angles, D, M, C, rows;  // rows of the cache
    Sequences sequences;

    i64 all() const { return M; }
    template <class T>
    const T* cos_of(i64 m) const { return static_cast<const T*>(cos) + m % angles * D; }
    template <class T>
    const T* sin_of(i64 m) const { return static_cast<const T*>(sin) + m % angles * D; }
};

// Keys or values (rows, K, S, D), what a cache keeps.
struct Buffer {
    QUINTET_FIELDS(memory, row, head, token)
    Span<char> memory;
    i64 row, head, token;

    template <class T>
    T* of(i64 row_, i64 kv) const { return reinterpret_cast<T*>(memory.p) + row_ * row + kv * head; }
    template <class T>
    bool fits(const Tokens& s, i64 K, i64 D) const {
        return memory.holds(reach({{s.rows, row}, {K, head}, {s.sequences.slots(), token}, {D, 1}}) * i64(sizeof(T)));
    }
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
    return {w, y};
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
    const SharedBuffer* shared_buffer = nullptr;  // of processes whose products add up; null for this one alone

    T* x() const { return static_cast<T*>(s.x); }
    Share share(i64 n) const { return Share(n, thread, threads); }

    // The rows that are this thread's of several maps of the same vectors.
    void map(const Map<T>* maps, i64 count, const Inputs<Matrix>& inputs, i64 I) {
        map_rows<Matrix>(maps, count, inputs.of.data(), s.all(), I, thread, threads, made);
    }

    // to += y, of the columns that are this thread's of C.
    void add(const T* y, T* to, i64 C) const {
        const Share mine = share(C);
        const i64 n = mine.to - mine.from;
        for (i64 m = 0; m < s.all(); ++m) {
            T* sum = to + m * C + mine.from;
            const T* more = y + m * C + mine.from;
            each_vector<T>(n, [&](i64 i, auto last) { set(sum, i, n, quintet::add(get(sum, i, n, last), get(more, i, n, last)), last); });
        }
    }

    // to += W of `inputs`, with `added` (M, O) as room; all see it behind this.
    void add(const Weight& w, const Inputs<Matrix>& inputs, i64 I, T* added, T* to) {
        const Map<T> map_ = map_of(w, added);
        map(&map_, 1, inputs, I);
        meet(added, w.O);
        add(added, to, w.O);
#pragma omp barrier
    }

    // y (M, C), of which each thread has made its columns, becomes the sum of all processes' y.
    void meet(T* y, i64 C) const {
        if (!shared_buffer) return;
#pragma omp barrier
        if (thread == 0) shared_buffer->sum(y, s.all() * C);
#pragma omp barrier
    }
};

// What matrices multiply, of vectors that all threads wrote.
template <class Matrix, class T>
Inputs<Matrix> taken_in(const T* x, i64 M, i64 I) {
    return Inputs<Matrix>(x, M, I, I);
}

// Memory that begins where a cache line does: what crosses lines is loaded at half the speed.
template <class T>
class Aligned {
  public:
    explicit Aligned(i64 n) : memory_(size_t(n) + 64 / sizeof(T)) {
        first_ = memory_.data() + size_t(-reinterpret_cast<uintptr_t>(memory_.data()) % 64) / sizeof(T);
    }
    Aligned(const Aligned&) = delete;
    T* data() const { return first_; }

  private:
    std::vector<T> memory_;
    T* first_;
};

// norm(x) as matrices multiply it, which a thread makes for itself without waiting for the others.
template <class Matrix, class T>
struct Normed {
    const i64 width;
    Aligned<T> rows;
    Inputs<Matrix> inputs;

    Normed(const Member<Matrix, T>& me, const Norm& norm)
        : width(norm.width(me.s.C)),
          rows(me.s.all() * width),
          inputs(me.s.all(), width) {
        const Tokens& s = me.s;
        std::vector<T> made(static_cast<size_t>(width));
        for (i64 m = 0; m < s.all(); ++m)
            normalise(source(s, norm.of, m, made.data()), norm.template scale<T>(),
                      rows.data() + m * width, width, float(norm.eps));
        inputs.fill(rows.data(), s.all(), width, 0, 1);
    }

  private:
    static const T* source(const Tokens& s, Source of, i64 m, T* made) {
        const T* x = static_cast<const T*>(s.x) + m * s.C;
        const T* beside = static_cast<const T*>(s.beside) + m * s.C;
        switch (of) {
            case HIDDEN: return x;
            case BESIDE: return beside;
            case SUM:
                for (i64 i = 0; i < s.C; ++i) narrow(widen(x[i]) + widen(beside[i]), made + i);
                return made;
            case WITH_EMBEDS:
                std::copy_n(x, s.C, made);
                std::copy_n(static_cast<const T*>(s.embeds) + m * s.C, s.C, made + s.C);
                return made;
        }
        return x;
    }
};

}  // namespace quintet
