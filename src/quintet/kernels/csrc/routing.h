// How well each expert suits a token, and which ones it goes to. One thread computes what it is
// asked for; a running team shares the experts, or the tokens, out among its threads.
#pragma once
#include <vector>

#include "simd.h"

namespace {

// Of logits (N, E) = x (N, C) · weight (E, C), summed in float32, those of the experts [from, to): a
// row of the weight is read once.
template <class T>
struct Logits {
    const T *x, *weight;
    float* y;
    i64 N, E, C, x_row, weight_row;

    void run(i64 from, i64 to) const {
        for (i64 e = from; e < to; ++e) {
            const T* w = weight + e * weight_row;
            for (i64 n = 0; n < N; ++n) {
                const T* of = x + n * x_row;
                F total = zero();
                i64 i = 0;
                for (; i + LANES <= C; i += LANES) total = fma(load(of + i), load(w + i), total);
                if (i < C) total = fma(load(of + i, C - i), load(w + i, C - i), total);
                y[n * E + e] = sum(total);
            }
        }
    }
};

enum Scoring : i64 { SOFTMAX, SIGMOID };

// Eight-byte fields, as Python fills them. A score is the softmax or the sigmoid of a logit; a choice
// goes by it and the bias, a weight by it alone. Of the groups, `kept` are open: those whose
// `ranked` best experts sum highest.
struct Rules {
    Scoring scoring;
    i64 E, A, groups, kept, ranked, normalise;
    double scaling;
    const float* bias;  // (E) or null
};

// The largest of those that are open, the first one of equals; NaN goes before all, as in torch.
template <class Open>
i64 best(const float* values, i64 n, Open&& open) {
    i64 found = -1;
    for (i64 i = 0; i < n; ++i)
        if (open(i) && (found < 0 || !(values[i] <= values[found]))) {
            found = i;
            if (values[i] != values[i]) break;
        }
    return found;
}

// The choice of experts, with the room it takes: each thread has its own.
class Router {
  public:
    explicit Router(const Rules& rules)
        : r_(rules), scores_(size_t(r_.E)), choice_(size_t(r_.E)), taken_(size_t(r_.E)), open_(size_t(r_.groups)) {}

    // A token's experts, the best first, and their weights, rounded as the logits are.
    template <class T>
    void choose(const T* logits, i64* indices, float* weights) {
        score(logits);
        open_groups();
        const i64 size = r_.E / r_.groups;
        std::fill(taken_.begin(), taken_.end(), 0);
        float total = 0.0f;
        for (i64 a = 0; a < r_.A; ++a) {
            const i64 e = best(choice_.data(), r_.E,
                               [&](i64 i) { return !taken_[size_t(i)] && open_[size_t(i / size)]; });
            taken_[size_t(e)] = 1;
            indices[a] = e;
            total += weights[a] = scores_[size_t(e)];
        }
        for (i64 a = 0; a < r_.A; ++a) {
            const float share = r_.normalise ? weights[a] / (total + 1e-20f) : weights[a];
            weights[a] = rounded<T>(share * float(r_.scaling));
        }
    }

  private:
    template <class T>
    void score(const T* logits) {
        const size_t E = size_t(r_.E);
        if (r_.scoring == SIGMOID) {
            for (size_t e = 0; e < E; ++e) scores_[e] = 1.0f / (1.0f + std::exp(-widen(logits[e])));
        } else {
            float most = -INFINITY, total = 0.0f;
            for (size_t e = 0; e < E; ++e) most = std::max(most, widen(logits[e]));
            for (size_t e = 0; e < E; ++e) total += scores_[e] = std::exp(widen(logits[e]) - most);
            for (size_t e = 0; e < E; ++e) scores_[e] /= total;
        }
        for (size_t e = 0; e < E; ++e) choice_[e] = r_.bias ? scores_[e] + r_.bias[e] : scores_[e];
    }

    void open_groups() {
        std::fill(open_.begin(), open_.end(), r_.kept == r_.groups);
        if (r_.kept == r_.groups) return;
        const i64 size = r_.E / r_.groups;
        std::fill(taken_.begin(), taken_.end(), 0);
        std::vector<float> totals(size_t(r_.groups));
        for (i64 g = 0; g < r_.groups; ++g)
            for (i64 k = 0; k < std::min(r_.ranked, size); ++k) {
                const i64 e = g * size + best(choice_.data() + g * size, size,
                                              [&](i64 i) { return !taken_[size_t(g * size + i)]; });
                taken_[size_t(e)] = 1;
                totals[size_t(g)] += choice_[size_t(e)];
            }
        for (i64 k = 0; k < r_.kept; ++k)
            open_[size_t(best(totals.data(), r_.groups, [&](i64 g) { return !open_[size_t(g)]; }))] = 1;
    }

    const Rules& r_;
    std::vector<float> scores_, choice_;
    std::vector<char> taken_, open_;
};

}  // namespace
