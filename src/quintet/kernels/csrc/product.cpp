// Linear maps of many vectors, and the gated half of an MLP. Each thread takes whole panels of a
// matrix and leads all rows past them.
#include <omp.h>

#include "orders.h"
#include "span.h"

using namespace quintet;

namespace {

constexpr i64 PACKED = i64(1) << 20;  // bytes of panels that fit the second-level cache

// y (M, O) = x·weightᵀ + bias, weight (O, I); or, with the matrix `up` beside the weight,
// silu(x·weightᵀ) · (x·upᵀ).
struct Map {
    Span<const bf16> weight;
    i64 stride;
    Span<const bf16> up;
    i64 up_stride;
    Span<const bf16> bias;
    Span<bf16> y;
    i64 O;

    bool fits(i64 M, i64 I) const {
        return O > 0 && weight.holds({{O, stride}, {I, 1}}) && (!up.given() || (up_stride == stride && up.holds({{O, stride}, {I, 1}}))) &&
               (!bias.given() || bias.holds(O)) && y.holds(M * O);
    }

    i64 width() const { return up ? LANES : 2 * LANES; }
    i64 panels() const { return (O + width() - 1) / width(); }
};

struct Call {
    i64 M, I, count, by_lanes;
    Span<const bf16> x;  // (M, I)
    i64 x_stride;

    const Map* maps() const { return behind<Map>(this); }
    i64 size() const { return i64(sizeof(Call)) + count * i64(sizeof(Map)); }
    bool fits() const {
        return M > 0 && I > 0 && count > 0 && x.holds({{M, x_stride}, {I, 1}}) &&
               std::all_of(maps(), maps() + count, [this](const Map& map) { return map.fits(M, I); });
    }
};

struct Work {
    const Map* map;
    i64 first;  // of the outputs

    Panel panel() const {
        const bf16* w = map->weight + first * map->stride;
        const i64 rows = map->O - first;
        return map->up ? panel_of(w, map->up + first * map->stride, map->stride, rows)
                       : panel_of(w, map->stride, rows);
    }
    void biases(float* to) const {
        for (i64 i = 0; i < 2 * LANES; ++i)
            // Added to a sum, minus zero leaves it as it is.
            to[i] = map->bias && first + i < map->O ? widen(map->bias[first + i]) : -0.0f;
    }
};

// How many panels a tile of rows meets while it is in the first-level cache: as many as leave the
// threads equal shares.
i64 panels_together(i64 panels, i64 bytes, i64 threads) {
    i64 together = 4;
    for (; together > 1; together /= 2) {
        const i64 groups = (panels + together - 1) / together;
        if (together * bytes <= PACKED && (groups % threads == 0 || groups >= 8 * threads)) break;
    }
    return together;
}

template <class Order>
void products(const Call& c) {
    using Number = typename Order::Number;
    const bf16* x = c.x;
    const i64 M = c.M, I = c.I, x_stride = c.x_stride;
    static thread_local Scratch of_caller, of_thread;
    std::vector<Work> works;
    for (const Map* map = c.maps(); map < c.maps() + c.count; ++map)
        for (i64 p = 0; p < map->panels(); ++p) works.push_back({map, p * map->width()});
    const i64 n = i64(works.size()), threads = omp_get_max_threads();
    const i64 tiles = (M + TILE - 1) / TILE, packed = Order::panel(I);
    const i64 together = panels_together(n, 4 * packed, threads), groups = (n + together - 1) / together;
    const bool lies = Order::as_it_lies(I, x_stride);
    const i64 row = lies ? x_stride : Order::row(I);
    Number* taken = nullptr;
    if (!lies) {
        of_caller.open(Scratch::room<Number>(M * row));
        taken = of_caller.take<Number>(M * row);
    }
    const Number* rows = lies ? reinterpret_cast<const Number*>(x) : taken;
#pragma omp parallel
    {
        if (!lies) {
#pragma omp for schedule(static)
            for (i64 m = 0; m < M; ++m) Order::take(x + m * x_stride, I, taken + m * row);
        }
        of_thread.open(together * (Scratch::room<uint32_t>(packed) + Scratch::room<float>(2 * LANES)));
        uint32_t* w = of_thread.take<uint32_t>(together * packed);
        float* biases = of_thread.take<float>(together * 2 * LANES);
#pragma omp for schedule(dynamic, 1)
        for (i64 group = 0; group < groups; ++group) {
            const i64 from = group * together, to = std::min(n, from + together);
            std::vector<Ahead> ahead;
            for (i64 j = from; j < to; ++j) {
                Order::fill(works[size_t(j)].panel(), I, w + (j - from) * packed);
                works[size_t(j)].biases(biases + (j - from) * 2 * LANES);
                // Most likely what this thread takes next.
                ahead.emplace_back(works[size_t(std::min(n - 1, j + threads * together))].panel(), tiles);
            }
            for (i64 t = 0; t < tiles; ++t) {
                const i64 m = M * t / tiles, size = M * (t + 1) / tiles - m;
                for (i64 j = from; j < to; ++j) {
                    const Map& map = *works[size_t(j)].map;
                    const i64 first = works[size_t(j)].first, columns = std::min(map.width(), map.O - first);
                    bf16* y = map.y + m * map.O + first;
                    const auto run = [&](const auto& finish) {
                        Order::run(size, w + (j - from) * packed, rows + m * row, row, I, ahead[size_t(j - from)], finish);
                    };
                    if (map.up)
                        run([&](int r, F gate, F up) __attribute__((always_inline)) {
                            const F made = mul(silu(gate), up);
                            if (columns == LANES)
                                store(y + r * map.O, made);
                            else
                                store(y + r * map.O, made, columns);
                        });
                    else
                        run([&](int r, F low, F high) __attribute__((always_inline)) {
                            const float* bias = biases + (j - from) * 2 * LANES;
                            store_both(y + r * map.O, add(low, load(bias)), add(high, load(bias + LANES)), columns);
                        });
                }
            }
        }
    }
}

void in_order(const Call& c) { c.by_lanes ? products<ByLanes>(c) : products<Along>(c); }

}  // namespace

QUINTET_ENTRY(product_bf16, Call, in_order)
