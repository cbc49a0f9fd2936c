// How well each expert suits a token, and which ones it goes to. One thread computes what it is
// asked for; a running team shares the experts, or the tokens, out among its threads.
#pragma once
#include "matrix.h"

namespace quintet {

// Of logits (N, E) = x (N, C) · weight (E, C), summed in float32, those of the experts [from, to): a
// row of the weight is read once.
template <class T>
struct Logits {
    const T *x, *weight;
    float* y;
    i64 N, E, C, x_row, weight_row;

    void run(i64 from, i64 to) const {
        constexpr int MOST = LANES == 16 ? 6 : 2;
        i64 e = from;
        for (; e + 4 <= to; e += 4) in_blocks<MOST>(N, [&](i64 n, auto some) { block<4, some()>(e, n); });
        for (; e < to; ++e) in_blocks<MOST>(N, [&](i64 n, auto some) { block<1, some()>(e, n); });
    }

  private:
    template <int R, int NB>
    void block(i64 e, i64 n) const {
        F acc[R][NB];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < NB; ++m) acc[r][m] = zero();
        const auto step = [&](i64 i, auto... rest) __attribute__((always_inline)) {
            F w[R];
            for (int r = 0; r < R; ++r) w[r] = load(weight + (e + r) * weight_row + i, rest...);
            for (int m = 0; m < NB; ++m) {
                const F of = load(x + (n + m) * x_row + i, rest...);
                for (int r = 0; r < R; ++r) acc[r][m] = fma(of, w[r], acc[r][m]);
            }
        };
        i64 i = 0;
        for (; i + LANES <= C; i += LANES) step(i);
        if (i < C) step(i, C - i);
        for (int m = 0; m < NB; ++m)
            for (int r = 0; r < R; ++r) y[(n + m) * E + e + r] = sum(acc[r][m]);
    }
};

// Whether all choices are of experts there are: what comes from a caller may be anything.
inline bool known(const i64* indices, i64 count, i64 E) {
    return std::all_of(indices, indices + count, [E](i64 e) { return 0 <= e && e < E; });
}

enum Scoring : i64 { SOFTMAX, SIGMOID };

// A score is the softmax or the sigmoid of a logit; a choice
// goes by it and the bias, a weight by it alone. Of the groups, `kept` are open: those whose
// `ranked` best experts sum highest.
struct Rules {
    QUINTET_FIELDS(scoring, E, A, groups, kept, ranked, normalise, scaling, bias)
    Scoring scoring;
    i64 E, A, groups, kept, ranked, normalise;
    double scaling;
    Span<const float> bias;  // (E) or null

    bool fits() const {
        return E > 0 && groups > 0 && E % groups == 0 && kept > 0 && kept <= groups && ranked > 0 && A > 0 &&
               A <= E / groups * kept && (!bias.given() || bias.holds(E));
    }
};

// The best `most` of the numbers offered, by their places: the highest first, of equals the one
// offered first; NaN goes before all, as in torch.
struct Best {
    const float* values;
    i64 most;
    i64* places;
    i64 count = 0;

    void offer(i64 i) {
        if (count == most && !before(i, places[count - 1])) return;
        i64 at = count < most ? count++ : count - 1;
        for (; at > 0 && before(i, places[at - 1]); --at) places[at] = places[at - 1];
        places[at] = i;
    }

  private:
    bool before(i64 i, i64 j) const { return !(values[i] <= values[j]) && values[j] == values[j]; }
};

// The choice of experts, with the room it takes: each thread has its own.
class Router {
  public:
    explicit Router(const Rules& rules)
        : r_(rules), size_(r_.E / r_.groups), scores_(room(r_.E)), choice_(room(r_.E)), totals_(room(r_.groups)),
          groups_(size_t(r_.groups)), ranked_(size_t(size_)) {}

    // A token's experts, the best first, and their weights, rounded as the logits are.
    template <class T>
    void choose(const T* logits, i64* indices, float* weights) {
        score(logits);
        Best experts{choice_.data(), r_.A, indices};
        const i64 open = open_groups();
        for (i64 k = 0; k < open; ++k)
            for (i64 e = groups_[size_t(k)] * size_; e < (groups_[size_t(k)] + 1) * size_; ++e) experts.offer(e);
        float total = 0.0f;
        for (i64 a = 0; a < r_.A; ++a) total += weights[a] = scores_[size_t(indices[a])];
        for (i64 a = 0; a < r_.A; ++a) {
            const float share = r_.normalise ? weights[a] / (total + 1e-20f) : weights[a];
            weights[a] = rounded<T>(share * float(r_.scaling));
        }
    }

  private:
    static size_t room(i64 n) { return size_t((n + LANES - 1) / LANES * LANES); }

    template <class T>
    void score(const T* logits) {
        const i64 E = r_.E;
        float* to = scores_.data();
        const auto each = [&](auto&& fn) {
            i64 e = 0;
            for (; e + LANES <= E; e += LANES) store(to + e, fn(load(logits + e), load(to + e)));
            if (e < E) store(to + e, fn(load(logits + e, E - e), load(to + e, E - e)), E - e);
        };
        if (r_.scoring == SIGMOID) {
            each([](F x, F) { return div(all(1.0f), add(all(1.0f), exp_of(sub(zero(), x)))); });
        } else {
            float most = -INFINITY, total = 0.0f;
            for (i64 e = 0; e < E; ++e) most = std::max(most, widen(logits[e]));
            each([&](F x, F) { return exp_of(sub(x, all(most))); });
            for (i64 e = 0; e < E; ++e) total += to[e];
            each([&](F, F y) { return div(y, all(total)); });
        }
        for (i64 e = 0; e < E; ++e) choice_[size_t(e)] = r_.bias ? to[e] + r_.bias[e] : to[e];
    }

    // Those whose experts may be chosen are put first, in their order; how many they are.
    i64 open_groups() {
        if (r_.kept == r_.groups) {
            for (i64 g = 0; g < r_.groups; ++g) groups_[size_t(g)] = g;
            return r_.groups;
        }
        for (i64 g = 0; g < r_.groups; ++g) {
            Best of_group{choice_.data() + g * size_, std::min(r_.ranked, size_), ranked_.data()};
            for (i64 i = 0; i < size_; ++i) of_group.offer(i);
            totals_[size_t(g)] = 0.0f;
            for (i64 k = 0; k < of_group.count; ++k) totals_[size_t(g)] += of_group.values[ranked_[size_t(k)]];
        }
        Best open{totals_.data(), r_.kept, groups_.data()};
        for (i64 g = 0; g < r_.groups; ++g) open.offer(g);
        std::sort(groups_.begin(), groups_.begin() + r_.kept);
        return r_.kept;
    }

    const Rules& r_;
    const i64 size_;
    std::vector<float> scores_, choice_, totals_;
    std::vector<i64> groups_, ranked_;
};

}  // namespace quintet
