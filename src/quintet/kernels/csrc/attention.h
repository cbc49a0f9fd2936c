// Softmax attention of bfloat16, a block of keys at a time (arXiv:2205.14135).
//
// The queries that share a key head are rows of one product; rows are lanes. A row's numbers are
// packed once, pair by pair, and a key's pairs are read as they lie and broadcast. Keys may be in
// two pieces, (k1 + k2), as those of latent attention are; the values may be one of the pieces, so
// that a latent is read from memory once for both products.
#pragma once
#include <omp.h>

#include "sequences.h"
#include "tiles.h"

namespace quintet {

constexpr i64 KEYS = 128;         // of a block
constexpr i64 WIDEST = 32;        // columns of values that are taken at once, where vectors are widest
constexpr i64 MOST_ROWS = 64;     // of a tile
// Keys whose sums are in registers at once, for one vector of rows and for two.
constexpr int KEY_TILE[] = {0, LANES, 12};
constexpr i64 PANEL = KEYS * LANES + LANES;  // pairs of 2 LANES columns of values, and a gap
constexpr float NOTHING = -1e30f; // the base of a row that has seen no key
constexpr float GROWTH = 8.0f;    // how far above its base a score may be, as a power of two
constexpr bf16 ONES[] = {{0x3F80}, {0x3F80}};

struct Strides {
    i64 row, head, token;
};

// S keys. A sequence's queries begin at `first` rows of q, its keys at its row of k; query t of head
// k·G + g sees the keys of head k from `window` before its own slot up to it; a window of 0 is none.
struct Attention {
    i64 S, K, G, D1, D2, Dv, window;
    const bf16 *q1, *q2, *k1, *k2, *v;
    bf16* out;
    Strides q1_at, q2_at, k1_at, k2_at, v_at, out_at;
    Sequences sequences;

    i64 end(const Sequence& s, i64 t) const { return std::min(S, s.end(t)); }
    i64 begin(const Sequence& s, i64 t) const { return window > 0 ? std::max<i64>(0, end(s, t) - window) : 0; }
};

// Scores of N keys in the lanes of V vectors of rows, which are `apart` in q: times the scale, less the
// rows' bases. `ahead` keys further on, a line a step is fetched: by the end, N keys.
template <int N, int V>
inline void score_tile(const uint32_t* q, i64 apart, const bf16* k1, i64 s1, i64 D1, const bf16* k2,
                       i64 s2, i64 D2, i64 ahead, F scale, const F* bases, float* scores) {
    F acc[N][V];
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k)
        for (int v = 0; v < V; ++v) acc[k][v] = zero();
    const auto piece = [&](const bf16* keys, i64 stride, i64 D) __attribute__((always_inline)) {
        const bf16* next = keys + ahead * stride;
        i64 column = 0;
        // Three keys to an address: more would not fit the registers for them.
        const bf16* at[(N + 2) / 3];
#pragma GCC unroll 6
        for (int i = 0; i < (N + 2) / 3; ++i) at[i] = keys + 3 * i * stride;
        for (i64 d = 0; d < D; d += 2, q += LANES) {
            if (N == KEY_TILE[V] && ahead) {
                prefetch<_MM_HINT_T1>(next + column, 0);
                column += 32;
                if (column >= D) column = 0, next += stride;
            }
            Pairs rows[V];
            for (int v = 0; v < V; ++v) rows[v] = load_lanes(q + v * apart);
#pragma GCC unroll 16
            for (int k = 0; k < N; ++k) {
                const Pairs key = same_pair(at[k / 3] + k % 3 * stride + d);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[k][v] = dot(acc[k][v], rows[v], key);
            }
        }
    };
    piece(k1, s1, D1);
    piece(k2, s2, D2);
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k)
        for (int v = 0; v < V; ++v) store(scores + v * KEYS * LANES + k * LANES, sub(mul(acc[k][v], scale), bases[v]));
}

// The values of `n` keys: panels of 2 LANES columns, in each the pairs of keys, `zip`ped.
inline void pack_values(const bf16* v, i64 stride, i64 n, i64 Dv, uint32_t* packed) {
    for (i64 pair = 0; pair < (n + 1) / 2; ++pair) {
        const bf16* one = v + 2 * pair * stride;
        const bool whole = 2 * pair + 1 < n;
        for (i64 panel = 0; panel < Dv / (2 * LANES); ++panel) {
            const Pairs a = load_pairs(one + 2 * LANES * panel);
            const Pairs b = whole ? load_pairs(one + stride + 2 * LANES * panel) : Pairs{};
            Pairs low, high;
            zip(a, b, &low, &high);
            uint32_t* to = packed + panel * PANEL + pair * 2 * LANES;
            store_pairs(to, low);
            store_pairs(to + LANES, high);
        }
    }
}

// Add to R rows of 2 LANES columns the values of pairs of keys, by their weights.
template <int R>
inline void mix_tile(const uint32_t* weights, const uint32_t* values, i64 pairs, float* out, i64 Dv) {
    F acc[R][2];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 2; ++c) acc[r][c] = load(out + r * Dv + c * LANES);
    for (i64 pair = 0; pair < pairs; ++pair) {
        const Pairs low = load_lanes(values + pair * 2 * LANES);
        const Pairs high = load_lanes(values + pair * 2 * LANES + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Pairs weight = same_pair(weights + pair * LANES + r);
            acc[r][0] = dot(acc[r][0], low, weight);
            acc[r][1] = dot(acc[r][1], high, weight);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 2; ++c) store(out + r * Dv + c * LANES, acc[r][c]);
}

// What one tile of rows has made of some of its keys: sums not yet divided by the total of weights.
struct TileSums {
    float *out, *top, *total;
    static i64 size(i64 Dv) { return MOST_ROWS * (Dv + 2); }
    TileSums(float* memory, i64 Dv)
        : out(memory), top(out + MOST_ROWS * Dv), total(top + MOST_ROWS) {}

    // What further keys gave M rows; nothing where they saw none of them.
    void add(const TileSums& other, i64 M, i64 Dv) const {
        for (i64 row = 0; row < M; row += LANES) {
            const F one = load(top + row), two = load(other.top + row), most = max(one, two);
            const F old = exp2_of(sub(one, most)), by = exp2_of(sub(two, most));
            store(top + row, most);
            store(total + row, fma(load(other.total + row), by, mul(load(total + row), old)));
            float olds[LANES], bys[LANES];
            store(olds, old), store(bys, by);
            for (i64 i = 0; i < std::min<i64>(LANES, M - row); ++i) {
                float* to = out + (row + i) * Dv;
                const float* from = other.out + (row + i) * Dv;
                for (i64 c = 0; c < Dv; c += LANES)
                    store(to + c, fma(load(from + c), all(bys[i]), mul(load(to + c), all(olds[i]))));
            }
        }
    }
};

// Rows m0 to m0 + M of a sequence and a key head.
class Tile {
  public:
    Tile(const Attention& a, float scale, const Sequence& s, i64 k, i64 m0, i64 M, Scratch& scratch)
        : a_(a), scale_(scale * 1.44269504f), s_(s), k_(k), M_(M), vectors_((M + LANES - 1) / LANES), pairs_((a.D1 + a.D2) / 2) {
        const i64 rows = vectors_ * LANES, wide = a.D1 + a.D2 + 32;
        copies_ = a.k1_at.token > 2 * a.D1 || a.k2_at.token > 2 * std::max<i64>(a.D2, 1);
        const i64 n_values = a.Dv / (2 * LANES) * PANEL, n_keys = copies_ ? KEYS * wide : 0;
        scratch.open(Scratch::room<uint32_t>(pairs_ * rows) + Scratch::room<uint32_t>(n_values) +
                     Scratch::room<float>(2 * LANES * KEYS) + Scratch::room<uint32_t>(rows * KEYS / 2) +
                     Scratch::room<bf16>(n_keys));
        q_ = scratch.take<uint32_t>(pairs_ * rows);
        values_ = scratch.take<uint32_t>(n_values);
        scores_ = scratch.take<float>(2 * LANES * KEYS);
        weights_ = scratch.take<uint32_t>(rows * KEYS / 2);
        keys_ = scratch.take<bf16>(n_keys);
        for (i64 i = 0; i < rows; ++i) pack_row(i, m0 + i, i < M);
    }

    // Over keys [from, to).
    void run(i64 from, i64 to, const TileSums& made) {
        for (i64 i = 0; i < vectors_ * LANES; ++i) made.top[i] = NOTHING, made.total[i] = 0.0f;
        std::fill(made.out, made.out + vectors_ * LANES * a_.Dv, 0.0f);
        for (i64 s = from; s < to; s += KEYS) block(s, std::min(KEYS, to - s), to, made);
    }

  private:
    void pack_row(i64 i, i64 m, bool real) {
        const i64 t = (real ? m : m - i) / a_.G, h = k_ * a_.G + m % a_.G;
        end_[i] = a_.end(s_, t);
        begin_[i] = a_.begin(s_, t);
        uint32_t* to = q_ + i / LANES * LANES * pairs_ + i % LANES;
        if (!real) {
            for (i64 d = 0; d < pairs_; ++d) to[d * LANES] = 0;
            return;
        }
        const bf16* one = a_.q1 + s_.first * a_.q1_at.row + t * a_.q1_at.token + h * a_.q1_at.head;
        for (i64 d = 0; d < a_.D1; d += 2, to += LANES) std::memcpy(to, one + d, 4);
        const bf16* two = a_.q2 + s_.first * a_.q2_at.row + t * a_.q2_at.token + h * a_.q2_at.head;
        for (i64 d = 0; d < a_.D2; d += 2, to += LANES) std::memcpy(to, two + d, 4);
    }

    void block(i64 s, i64 n, i64 to, const TileSums& made) {
        const bf16* v = a_.v + s_.row * a_.v_at.row + k_ * a_.v_at.head + s * a_.v_at.token;
        pack_values(v, a_.v_at.token, n, a_.Dv, values_);
        const Keys keys = keys_at(s, n);
        const i64 pairs = (n + 1) / 2;
        i64 vec = 0;
        if (LANES == 16)
            for (; vec + 2 <= vectors_; vec += 2) weigh_keys<2>(keys, vec, s, n, to, made);
        for (; vec < vectors_; ++vec) weigh_keys<1>(keys, vec, s, n, to, made);
        // Fewer rows at a time where those of other tiles want room in the first-level cache.
        if (LANES == 16 && vectors_ == 1)
            mix<8>(pairs, made);
        else
            mix<4>(pairs, made);
    }

    struct Keys {
        const bf16 *k1, *k2;
        i64 s1, s2;
    };

    Keys keys_at(i64 s, i64 n) {
        const bf16* k1 = a_.k1 + s_.row * a_.k1_at.row + k_ * a_.k1_at.head + s * a_.k1_at.token;
        const bf16* k2 = a_.k2 + s_.row * a_.k2_at.row + k_ * a_.k2_at.head + s * a_.k2_at.token;
        const i64 s1 = a_.k1_at.token, s2 = a_.k2_at.token;
        if (!copies_) return {k1, k2, s1, s2};
        // Keys far apart fall on each other's places in the cache.
        const i64 wide = a_.D1 + a_.D2 + 32;
        for (i64 i = 0; i < n; ++i) {
            std::memcpy(keys_ + i * wide, k1 + i * s1, size_t(2 * a_.D1));
            if (a_.D2) std::memcpy(keys_ + i * wide + a_.D1, k2 + i * s2, size_t(2 * a_.D2));
        }
        return {keys_, keys_ + a_.D1, wide, wide};
    }

    // From keys to weights, for V vectors of rows, whose scores are not to leave the first-level cache.
    template <int V>
    void weigh_keys(const Keys& keys, i64 vec, i64 s, i64 n, i64 to, const TileSums& made) {
        F bases[V];
        for (int v = 0; v < V; ++v) bases[v] = base_of(load(made.top + (vec + v) * LANES));
        const i64 ahead = vec == 0 && !copies_ && s + 2 * KEYS <= to ? KEYS : 0, apart = LANES * pairs_;
        i64 i = 0;
        const auto tiles = [&](auto count) __attribute__((always_inline)) {
            for (; i + count <= n; i += count)
                score_tile<count, V>(q_ + vec * apart, apart, keys.k1 + i * keys.s1, keys.s1, a_.D1,
                                     keys.k2 + i * keys.s2, keys.s2, a_.D2, ahead, all(scale_), bases,
                                     scores_ + i * LANES);
        };
        tiles(std::integral_constant<int, KEY_TILE[V]>());
        if (V == 2) tiles(std::integral_constant<int, 8>());
        tiles(std::integral_constant<int, 4>());
        tiles(std::integral_constant<int, 1>());
        for (int v = 0; v < V; ++v) {
            float* scores = scores_ + v * KEYS * LANES;
            if (n % 2) store(scores + n * LANES, all(-INFINITY));
            if (masks(s, n, vec + v)) hide(s, n, vec + v, scores);
            weigh(vec + v, (n + 1) / 2, scores, made);
        }
    }

    bool masks(i64 s, i64 n, i64 vec) const {
        for (i64 i = vec * LANES; i < (vec + 1) * LANES; ++i)
            if (begin_[i] > s || end_[i] < s + n) return true;
        return false;
    }

    void hide(i64 s, i64 n, i64 vec, float* scores) {
        for (i64 i = 0; i < LANES; ++i) {
            float* mine = scores + i;
            const i64 row = vec * LANES + i;
            const i64 first = std::clamp<i64>(begin_[row] - s, 0, n);
            const i64 last = std::clamp<i64>(end_[row] - s, 0, n);
            for (i64 j = 0; j < first; ++j) mine[j * LANES] = -INFINITY;
            for (i64 j = last; j < n; ++j) mine[j * LANES] = -INFINITY;
        }
    }

    // What is subtracted from a row's scores: nothing before it has seen a key.
    static F base_of(F top) { return unless_below(top, NOTHING / 2, top); }

    void weigh(i64 vec, i64 pairs, float* scores, const TileSums& made) {
        F most = all(-INFINITY), other = most;
        for (i64 j = 0; j < 2 * pairs; j += 2) {
            most = max(most, load(scores + j * LANES));
            other = max(other, load(scores + (j + 1) * LANES));
        }
        most = max(most, other);
        const F top = load(made.top + vec * LANES);
        if (any_above(most, all(GROWTH)) || any_above(all(NOTHING / 2), top)) raise(vec, pairs, scores, most, made);
        uint32_t* weights = weights_ + vec * KEYS / 2 * LANES;
        F total = load(made.total + vec * LANES);
        const Pairs ones = same_pair(ONES);
        for (i64 j = 0; j < pairs; ++j) {
            const Pairs both = rounded_pairs(coarse_exp2_of(load(scores + 2 * j * LANES)),
                                             coarse_exp2_of(load(scores + (2 * j + 1) * LANES)));
            total = dot(total, both, ones);
            store_pairs(weights + j * LANES, both);
        }
        store(made.total + vec * LANES, total);
    }

    // Take the largest score for a base where a row has none yet, or grew far above the one it has: so
    // what was summed is seldom rescaled.
    __attribute__((noinline)) void raise(i64 vec, i64 pairs, float* scores, F largest, const TileSums& made) {
        float most[LANES], by[LANES] = {};
        store(most, largest);
        for (i64 i = 0; i < LANES; ++i) {
            const i64 row = vec * LANES + i;
            const bool seen = made.top[row] > NOTHING / 2;
            if (!(most[i] > (seen ? GROWTH : -INFINITY))) continue;
            by[i] = most[i];
            made.top[row] = seen ? made.top[row] + by[i] : by[i];
            if (!seen) continue;
            const float fade = std::exp2(-by[i]);
            made.total[row] *= fade;
            float* out = made.out + row * a_.Dv;
            for (i64 c = 0; c < a_.Dv; c += LANES) store(out + c, mul(load(out + c), all(fade)));
        }
        const F lower = load(by);
        for (i64 j = 0; j < 2 * pairs; ++j) store(scores + j * LANES, sub(load(scores + j * LANES), lower));
    }

    template <int R>
    void mix(i64 pairs, const TileSums& made) {
        for (i64 panel = 0; panel < a_.Dv / (2 * LANES); ++panel)
            for (i64 row = 0; row < M_; row += R)
                mix_tile<R>(weights_ + row / LANES * KEYS / 2 * LANES + row % LANES,
                            values_ + panel * PANEL, pairs,
                            made.out + row * a_.Dv + panel * 2 * LANES, a_.Dv);
    }

    const Attention& a_;
    const float scale_;  // for powers of two, not of e
    const Sequence& s_;
    const i64 k_, M_, vectors_, pairs_;
    bool copies_;
    uint32_t *q_, *values_, *weights_;
    float* scores_;
    bf16* keys_;
    i64 begin_[MOST_ROWS], end_[MOST_ROWS];
};

// Write a row of which all keys are summed.
inline void finish_row(const Attention& a, const TileSums& made, i64 i, bf16* to) {
    const F share = all(1.0f / made.total[i]);
    for (i64 c = 0; c < a.Dv; c += 2 * LANES) {
        const float* from = made.out + i * a.Dv + c;
        F first, second;
        columns(fma(load(from), share, zero()), fma(load(from + LANES), share, zero()), &first, &second);
        store(to + c, first);
        store(to + c + LANES, second);
    }
}

// How attention is divided: tiles of rows, and where those are too few for the threads, the parts of
// their keys too. What is in the making takes memory that all threads share.
struct Division {
    struct Item {
        const Sequence* s;
        i64 k, m0, M, slot;  // the first of its parts' in memory
        Parts parts;
    };
    std::vector<Item> items;
    i64 slots = 0, jobs, size;
    bool splits;

    Division(const Attention& a, i64 threads) : size(TileSums::size(a.Dv)) {
        for (const Sequence& s : a.sequences)
            for (i64 k = 0; k < a.K; ++k)
                for (i64 m0 = 0; m0 < s.length * a.G; m0 += MOST_ROWS) {
                    const i64 M = std::min(MOST_ROWS, s.length * a.G - m0);
                    items.push_back({&s, k, m0, M, slots, Parts(a.begin(s, m0 / a.G), a.end(s, (m0 + M - 1) / a.G))});
                    slots += items.back().parts.count;
                }
        const i64 tiles = i64(items.size());
        splits = tiles < 4 * threads && tiles % threads != 0;
        jobs = splits ? slots : tiles;
        if (!splits) slots = 2 * threads;
    }

    i64 room() const { return slots * size; }
    const Item& of_slot(i64 slot) const {
        return *std::prev(std::upper_bound(items.begin(), items.end(), slot,
                                           [](i64 at, const Item& item) { return at < item.slot; }));
    }
};

// Every thread of a running team calls it, no more of them than the division was made for, with the
// same `memory`; none returns before all is written.
inline void attend(const Attention& a, float scale, const Division& d, float* memory) {
    static thread_local Scratch of_thread;
    using Item = Division::Item;
    // Blocks begin where they do for every other row.
    const auto from = [](const Item& item, i64 i) { return item.parts.from(i) / KEYS * KEYS; };
    const auto sums = [&](i64 slot) { return TileSums(memory + slot * d.size, a.Dv); };
    const auto finish = [&](const Item& item, const TileSums& made) {
        for (i64 i = 0; i < item.M; ++i) {
            const i64 m = item.m0 + i, t = m / a.G, h = item.k * a.G + m % a.G;
            finish_row(a, made, i, a.out + item.s->first * a.out_at.row + t * a.out_at.token + h * a.out_at.head);
        }
    };
#pragma omp for schedule(dynamic, 1)
    for (i64 job = 0; job < d.jobs; ++job) {
        // The last tiles see the most keys and go first.
        const i64 at = d.jobs - 1 - job;
        const Item& item = d.splits ? d.of_slot(at) : d.items[size_t(at)];
        Tile tile(a, scale, *item.s, item.k, item.m0, item.M, of_thread);
        if (d.splits) {
            tile.run(from(item, at - item.slot), item.parts.to(at - item.slot), sums(at));
            continue;
        }
        const TileSums made = sums(2 * omp_get_thread_num()), part = sums(2 * omp_get_thread_num() + 1);
        tile.run(from(item, 0), item.parts.to(0), made);
        for (i64 i = 1; i < item.parts.count; ++i) {
            tile.run(from(item, i), item.parts.to(i), part);
            made.add(part, item.M, a.Dv);
        }
        finish(item, made);
    }
    if (!d.splits) return;
#pragma omp for schedule(static)
    for (size_t at = 0; at < d.items.size(); ++at) {
        const Item& item = d.items[at];
        const TileSums made = sums(item.slot);
        for (i64 i = 1; i < item.parts.count; ++i) made.add(sums(item.slot + i), item.M, a.Dv);
        finish(item, made);
    }
}

// What threads that are about to run need besides, kept from call to call.
inline float* memory_of(const Division& division) {
    static thread_local Scratch of_parts;
    of_parts.open(Scratch::room<float>(division.room()));
    return of_parts.take<float>(division.room());
}

}  // namespace quintet
