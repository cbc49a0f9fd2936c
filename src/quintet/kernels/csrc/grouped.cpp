// Experts of many tokens: those of one expert go through it together, a block at a time, and each
// thread takes whole blocks.
#include <omp.h>

#include "orders.h"
#include "routing.h"
#include "span.h"

using namespace quintet;

namespace {

constexpr i64 BLOCK = 288;  // tokens at most that go through an expert together
constexpr i64 MADE = i64(64) << 20;  // bytes of experts' outputs that wait to be summed

// x (N, C), indices and shares (N, A), gate_up (E, 2F, C), down (E, C, F), out (N, C).
struct Grouped {
    i64 N, A, E, C, F, by_lanes;
    Span<const bf16> x;
    i64 x_stride;
    Span<const i64> indices;
    Span<const float> shares;
    Span<const bf16> gate_up, down;
    Span<bf16> out;

    i64 size() const { return sizeof(Grouped); }
    bool fits() const {
        return N > 0 && A > 0 && E > 0 && C > 0 && F > 0 && x.holds({{N, x_stride}, {C, 1}}) &&
               indices.holds(N * A) && shares.holds(N * A) && gate_up.holds(E * 2 * F * C) &&
               down.holds(E * C * F) && out.holds(N * C) && known(indices, N * A, E);
    }
};

struct Job {
    i64 expert, from, count;
};

// Where the panels of an expert lie, in the order in which they are taken: of gates and ups, then of downs.
struct Panels {
    const Grouped& g;
    i64 gates() const { return (g.F + LANES - 1) / LANES; }
    i64 count() const { return gates() + (g.C + 2 * LANES - 1) / (2 * LANES); }
    Panel at(i64 expert, i64 p) const {
        if (p < gates()) {
            const bf16* gate = g.gate_up + (expert * 2 * g.F + p * LANES) * g.C;
            return panel_of(gate, gate + g.F * g.C, g.C, g.F - p * LANES);
        }
        const i64 c = (p - gates()) * 2 * LANES;
        return panel_of(g.down + (expert * g.C + c) * g.F, g.F, g.C - c);
    }
};

template <class Order>
void run(const Grouped& g, const Job& job, i64 next_expert, const bf16* x, const i64* slots, float* made) {
    static thread_local Scratch scratch;
    const i64 n = job.count, C = g.C, F_ = g.F, wide = Order::row(C), narrow = Order::row(F_);
    const i64 packed = std::max(Order::panel(C), Order::panel(F_)), tiles = (n + TILE - 1) / TILE;
    using Number = typename Order::Number;
    scratch.open(Scratch::room<Number>(n * wide) + Scratch::room<Number>(n * narrow) +
                 Scratch::room<bf16>(n * F_) + Scratch::room<uint32_t>(packed));
    Number *input = scratch.take<Number>(n * wide), *hidden = scratch.take<Number>(n * narrow);
    bf16* gated = scratch.take<bf16>(n * F_);
    uint32_t* w = scratch.take<uint32_t>(packed);
    for (i64 m = 0; m < n; ++m) Order::take(x + slots[job.from + m] / g.A * g.x_stride, C, input + m * wide);
    const Panels panels{g};
    for (i64 p = 0; p < panels.count(); ++p) {
        const bool first = p < panels.gates();
        const Panel panel = panels.at(job.expert, p);
        const i64 columns = panel.lows + (first ? 0 : panel.highs), I = first ? C : F_;
        if (p == panels.gates())
            for (i64 m = 0; m < n; ++m) Order::take(gated + m * F_, F_, hidden + m * narrow);
        Order::fill(panel, I, w);
        Ahead ahead(p + 1 < panels.count() ? panels.at(job.expert, p + 1) : panels.at(next_expert, 0), tiles);
        for (i64 t = 0; t < tiles; ++t) {
            const i64 m = n * t / tiles, size = n * (t + 1) / tiles - m;
            if (first) {
                bf16* y = gated + m * F_ + p * LANES;
                Order::run(size, w, input + m * wide, wide, I, ahead,
                         [&](int r, F gate, F up) __attribute__((always_inline)) {
                             store(y + r * F_, mul(silu(gate), up), columns);
                         });
            } else {
                const i64* slot = slots + job.from + m;
                float* y = made + (p - panels.gates()) * 2 * LANES;
                Order::run(size, w, hidden + m * narrow, narrow, I, ahead,
                         [&](int r, F low, F high) __attribute__((always_inline)) {
                             float* to = y + slot[r] * C;
                             store(to, low, std::min<i64>(LANES, columns));
                             if (columns > LANES) store(to + LANES, high, columns - LANES);
                         });
            }
        }
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
    // Small ones are left for the end, where threads wait for each other.
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.count > b.count; });
    return jobs;
}

// Experts are added in the order in which a token chose them, whatever the threads do.
void add_up(const Grouped& g, i64 token, const float* made) {
    const float* shares = g.shares + token * g.A;
    for (i64 c = 0; c < g.C; c += LANES) {
        const i64 m = std::min<i64>(LANES, g.C - c);
        F y = zero();
        for (i64 a = 0; a < g.A; ++a) {
            const float* from = made + a * g.C + c;
            y = fma(all(shares[a]), m == LANES ? load(from) : load(from, m), y);
        }
        store(g.out + token * g.C + c, y, m);
    }
}

template <class Order>
void grouped(const Grouped& g) {
    static thread_local Scratch scratch;
    const i64 most = std::max<i64>(256, MADE / (4 * g.C * g.A));
    const i64 room = std::min(g.N, most) * g.A * g.C;
    scratch.open(Scratch::room<float>(room));
    float* made = scratch.take<float>(room);
    std::vector<i64> slots;
    for (i64 first = 0; first < g.N; first += most) {
        const i64 n = std::min(most, g.N - first);
        const std::vector<Job> jobs = sort(g.indices + first * g.A, n * g.A, g.E, &slots);
        const bf16* x = g.x + first * g.x_stride;
#pragma omp parallel
        {
#pragma omp for schedule(dynamic, 1)
            for (size_t j = 0; j < jobs.size(); ++j) {
                const size_t next = std::min(jobs.size() - 1, j + size_t(omp_get_num_threads()));
                run<Order>(g, jobs[j], jobs[next].expert, x, slots.data(), made);
            }
#pragma omp for schedule(static)
            for (i64 t = 0; t < n; ++t) add_up(g, first + t, made + t * g.A * g.C);
        }
    }
}

void in_order(const Grouped& g) { g.by_lanes ? grouped<ByLanes>(g) : grouped<Along>(g); }

}  // namespace

QUINTET_ENTRY(grouped_bf16, Grouped, in_order)
