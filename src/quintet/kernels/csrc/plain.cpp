// Products of matrices as they are: bound by reading them, one thread one line of memory, or by vectors
// enough to share what was read.
#include "across.h"

using namespace quintet;

namespace {

template <class T>
struct Rows : Plain<T> {
    using typename Plain<T>::Input;
    using Plain<T>::w;
    using Plain<T>::I;
    using Plain<T>::stride;

    void run(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        if constexpr (std::is_same_v<T, bf16>)
            if (M >= MANY && to - from >= ROWS_ACROSS) return across(x, M, from, to, put);
        constexpr int MOST = LANES == 16 ? 6 : 2;
        i64 o = from;
        for (; M > 1 && o + 4 <= to; o += 4)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<4, n()>(x, m, o, put); });
        for (; o < to; ++o)
            in_blocks<MOST>(M, [&](i64 m, auto n) { block<1, n()>(x, m, o, put); });
    }

  private:
    // From so many vectors on, it pays that they lie across the lanes.
#if defined(__AVX512BF16__)
    static constexpr i64 MANY = 9;
#else
    static constexpr i64 MANY = LANES == 16 ? 13 : 5;
#endif

    // R rows by MB vectors. While the first block of vectors computes, the next R rows are on their
    // way, in the order in which memory has them; of a single row the processor sees best what comes next.
    template <int R, int MB>
    void block(const Input* x, i64 m0, i64 o, const Products& put) const {
        using C = Chunk<T>;
        constexpr i64 N = C::SIZE;
        const T* p = w + o * stride;
        const T* next = p + R * stride;
        F acc[R][MB];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < MB; ++m) acc[r][m] = zero();
        i64 i = 0;
        for (; i + N <= I; i += N) {
            typename C::V wv[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (R * MB > 1 && m0 == 0) prefetch<_MM_HINT_T1>(next + i * R + r * N, 0);
                wv[r] = C::at(p + r * stride + i);
            }
#pragma GCC unroll 6
            for (int m = 0; m < MB; ++m) {
                const typename C::V xv = C::at(x[m0 + m] + i);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) acc[r][m] = C::dot_to(acc[r][m], wv[r], xv);
            }
        }
        if (i < I)
            for (int m = 0; m < MB; ++m)
                for (int r = 0; r < R; ++r)
                    acc[r][m] = C::dot_to(acc[r][m], C::at(p + r * stride + i, I - i),
                                          C::at(x[m0 + m] + i, I - i));
        for (int m = 0; m < MB; ++m) {
            float made[R];
            const auto lanes = [&](int r) { return acc[r][m]; };
            row_sums<R>(lanes, made);
            for (int r = 0; r < R; ++r) put(m0 + m, o + r, made[r]);
        }
    }

    // The same sums, vectors across the lanes. The last block of rows may repeat some of the one before.
    void across(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
        static thread_local Scratch scratch;
        const i64 groups = (M + LANES - 1) / LANES, size = across_size(I);
        scratch.open(Scratch::room<uint32_t>(groups * size));
        uint32_t* laid = scratch.take<uint32_t>(groups * size);
        in_groups(M, [&](i64 m, i64 n, auto G) { lay_across<G()>(x + m, n, I, laid + m / LANES * size); });
        for (i64 o = from; o < to; o += ROWS_ACROSS) {
            o = std::min(o, to - ROWS_ACROSS);
            const bool more = o + 2 * ROWS_ACROSS <= to;
            Next next{reinterpret_cast<const char*>(w + (o + ROWS_ACROSS) * stride), more ? ROWS_ACROSS * stride * i64(sizeof(T)) : 0};
            in_groups(M, [&](i64 m, i64 n, auto G) {
                alignas(64) float made[ROWS_ACROSS * G() * LANES];
                meet<G(), ROWS_ACROSS>(w + o * stride, stride, laid + m / LANES * size, I, next, made);
                put_across<ROWS_ACROSS>(made, G() * LANES, n, put, m, o);
            });
        }
    }
};

}  // namespace

namespace quintet {

template <class T>
void Plain<T>::rows(const Input* x, i64 M, i64 from, i64 to, const Products& put) const {
    Rows<T>{*this}.run(x, M, from, to, put);
}
template struct Plain<bf16>;
template struct Plain<float>;

}  // namespace quintet
