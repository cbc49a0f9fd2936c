// Experts of many tokens: those of one expert go through it together, a block at a time, and each
// thread takes whole blocks.
#include <omp.h>

#include "tiles.h"

namespace {

constexpr i64 BLOCK = 72;  // tokens whose inputs and gated products fit the second-level cache
constexpr i64 ROWS = 16;   // of a matrix at a time
constexpr i64 VECTORS = LANES == 16 ? 6 : 2;
constexpr i64 MADE = i64(32) << 20;  // bytes of experts' outputs that wait to be summed

// Eight-byte fields, as Python fills them: x (N, C), indices and shares (N, A), gate_up (E, 2F, C),
// down (E, C, F), out (N, C).
struct Grouped {
    i64 N, A, E, C, F, x_stride;
    const bf16* x;
    const i64* indices;
    const float* shares;
    const bf16 *gate_up, *down;
    bf16* out;
};

struct Job {
    i64 expert, from, count;
};

// y[m][r] of R rows of w and M vectors; the first vectors fetch the rows that come next.
template <int R, int M>
inline void tile(const bf16* w, i64 I, const bf16* x, float* y, bool fetch) {
    F acc[M][4];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < 4; ++r) acc[m][r] = zero();
    i64 i = 0;
    for (; i + 2 * LANES <= I; i += 2 * LANES) {
        Pairs rows[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (fetch) prefetch<_MM_HINT_T1>(w + R * I + i * R + r * 2 * LANES, 0);
            rows[r] = load_pairs(w + r * I + i);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Pairs v = load_pairs(x + m * I + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[m][r] = dot(acc[m][r], rows[r], v);
        }
    }
    if (i < I)
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r)
                acc[m][r] = dot(acc[m][r], load_pairs(w + r * I + i, I - i),
                                load_pairs(x + m * I + i, I - i));
    for (int m = 0; m < M; ++m) {
        float four[4];
        sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3], four);
        for (int r = 0; r < R; ++r) y[m * ROWS + r] = four[r];
    }
}

template <int R>
void group(const bf16* w, i64 I, const bf16* x, i64 n, float* y) {
    const i64 blocks = (n + VECTORS - 1) / VECTORS;
    for (i64 b = 0; b < blocks; ++b) {
        const i64 m = n * b / blocks, size = n * (b + 1) / blocks - m;
        switch (size) {
            case 1: tile<R, 1>(w, I, x + m * I, y + m * ROWS, b == 0); break;
            case 2: tile<R, 2>(w, I, x + m * I, y + m * ROWS, b == 0); break;
            case 3: tile<R, 3>(w, I, x + m * I, y + m * ROWS, b == 0); break;
            case 4: tile<R, 4>(w, I, x + m * I, y + m * ROWS, b == 0); break;
            case 5: tile<R, 5>(w, I, x + m * I, y + m * ROWS, b == 0); break;
            case 6: tile<R, 6>(w, I, x + m * I, y + m * ROWS, b == 0); break;
        }
    }
}

// y[m][r] = w[r]·x[m] of at most ROWS rows.
void product(const bf16* w, i64 rows, i64 I, const bf16* x, i64 n, float* y) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) group<4>(w + r * I, I, x, n, y + r);
    for (; r < rows; ++r) group<1>(w + r * I, I, x, n, y + r);
}

void run(const Grouped& g, const Job& job, const bf16* x, const i64* slots, bf16* made) {
    static thread_local Scratch scratch;
    const i64 n = job.count, C = g.C, F_ = g.F;
    scratch.open(Scratch::room<bf16>(n * C) + Scratch::room<bf16>(n * F_) +
                 2 * Scratch::room<float>(n * ROWS));
    bf16 *input = scratch.take<bf16>(n * C), *gated = scratch.take<bf16>(n * F_);
    float *one = scratch.take<float>(n * ROWS), *two = scratch.take<float>(n * ROWS);
    for (i64 m = 0; m < n; ++m)
        std::memcpy(input + m * C, x + slots[job.from + m] / g.A * g.x_stride, size_t(C) * 2);
    const bf16 *gates = g.gate_up + job.expert * 2 * F_ * C, *ups = gates + F_ * C;
    for (i64 f = 0; f < F_; f += ROWS) {
        const i64 rows = std::min(ROWS, F_ - f);
        product(gates + f * C, rows, C, input, n, one);
        product(ups + f * C, rows, C, input, n, two);
        for (i64 m = 0; m < n; ++m)
            for (i64 r = 0; r < rows; r += LANES) {
                const F y = mul(silu(load(one + m * ROWS + r)), load(two + m * ROWS + r));
                store(gated + m * F_ + f + r, y, std::min<i64>(LANES, rows - r));
            }
    }
    const bf16* downs = g.down + job.expert * C * F_;
    for (i64 c = 0; c < C; c += ROWS) {
        const i64 rows = std::min(ROWS, C - c);
        product(downs + c * F_, rows, F_, gated, n, one);
        for (i64 m = 0; m < n; ++m)
            for (i64 r = 0; r < rows; r += LANES)
                store(made + slots[job.from + m] * C + c + r, load(one + m * ROWS + r),
                      std::min<i64>(LANES, rows - r));
    }
}

// The choices sorted by expert, and the blocks to compute.
std::vector<Job> sort(const i64* indices, i64 count, i64 E, std::vector<i64>* slots) {
    std::vector<i64> starts(static_cast<size_t>(E + 1));
    for (i64 i = 0; i < count; ++i) ++starts[size_t(indices[i] + 1)];
    for (i64 e = 0; e < E; ++e) starts[size_t(e + 1)] += starts[size_t(e)];
    std::vector<i64> next(starts);
    slots->resize(size_t(count));
    for (i64 i = 0; i < count; ++i) (*slots)[size_t(next[size_t(indices[i])]++)] = i;
    std::vector<Job> jobs;
    for (i64 e = 0; e < E; ++e) {
        const i64 from = starts[size_t(e)], n = starts[size_t(e + 1)] - from;
        const i64 blocks = (n + BLOCK - 1) / BLOCK;
        for (i64 b = 0; b < blocks; ++b)
            jobs.push_back({e, from + n * b / blocks, n * (b + 1) / blocks - n * b / blocks});
    }
    return jobs;
}

// Experts are added in the order in which a token chose them, whatever the threads do.
void add_up(const Grouped& g, i64 token, const bf16* made) {
    const float* shares = g.shares + token * g.A;
    for (i64 c = 0; c < g.C; c += LANES) {
        const i64 m = std::min<i64>(LANES, g.C - c);
        F y = zero();
        for (i64 a = 0; a < g.A; ++a) {
            const bf16* from = made + a * g.C + c;
            y = fma(all(shares[a]), m == LANES ? load(from) : load(from, m), y);
        }
        store(g.out + token * g.C + c, y, m);
    }
}

}  // namespace

extern "C" void quintet_grouped_bf16(const Grouped* grouped) {
    static thread_local Scratch scratch;
    const Grouped& g = *grouped;
    const i64 most = std::max<i64>(256, MADE / (2 * g.C * g.A));
    const i64 room = std::min(g.N, most) * g.A * g.C;
    scratch.open(Scratch::room<bf16>(room));
    bf16* made = scratch.take<bf16>(room);
    std::vector<i64> slots;
    for (i64 first = 0; first < g.N; first += most) {
        const i64 n = std::min(most, g.N - first);
        const std::vector<Job> jobs = sort(g.indices + first * g.A, n * g.A, g.E, &slots);
        const bf16* x = g.x + first * g.x_stride;
#pragma omp parallel
        {
#pragma omp for schedule(dynamic, 1)
            for (size_t j = 0; j < jobs.size(); ++j) run(g, jobs[j], x, slots.data(), made);
#pragma omp for schedule(static)
            for (i64 t = 0; t < n; ++t) add_up(g, first + t, made + t * g.A * g.C);
        }
    }
}
