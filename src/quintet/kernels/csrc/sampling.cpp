// What becomes of logits before a token is chosen.
#include "span.h"

using namespace quintet;

namespace {

// Of the ids (B, T) those count that are kept.
struct Call {
    i64 B, V, T;
    double penalty;
    Span<const float> x;  // (B, V)
    Span<const i64> ids;
    i64 ids_row;
    Span<const uint8_t> kept;  // (B, T), null for all
    Span<float> y;             // (B, V)

    i64 size() const { return sizeof(Call); }
    // Ids that there is no logit for are of a larger embedding; there are none below zero.
    bool fits() const {
        return x.holds(B * V) && y.holds(B * V) && ids.holds({{B, ids_row}, {T, 1}}) &&
               (!kept.given() || kept.holds(B * T)) && !below_zero();
    }
    bool counts(i64 b, i64 t) const { return !kept.given() || kept[b * T + t]; }
    i64 id(i64 b, i64 t) const { return ids[b * ids_row + t]; }

  private:
    bool below_zero() const {
        for (i64 b = 0; b < B; ++b)
            for (i64 t = 0; t < T; ++t)
                if (id(b, t) < 0 && counts(b, t)) return true;
        return false;
    }
};

// y = x, but divided by the penalty where an id counts, or multiplied below zero. An id that occurs
// often is penalised once, as x stays what it is.
void penalise_repetition(const Call& c) {
    const float penalty = float(c.penalty);
    for (i64 b = 0; b < c.B; ++b) {
        const float* from = c.x + b * c.V;
        float* to = c.y + b * c.V;
        std::copy_n(from, c.V, to);
        for (i64 t = 0; t < c.T; ++t) {
            const i64 id = c.id(b, t);
            if (id < c.V && c.counts(b, t)) to[id] = from[id] < 0 ? from[id] * penalty : from[id] / penalty;
        }
    }
}

}  // namespace

QUINTET_ENTRY(penalise_repetition, Call, penalise_repetition)
