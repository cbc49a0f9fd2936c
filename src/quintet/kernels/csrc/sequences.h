// Tokens of several sequences in one row, and the keys they meet.
#pragma once
#include "span.h"

namespace quintet {

// Tokens of one sequence, one behind the other.
struct Sequence {
    i64 row;     // of the cache
    i64 start;   // the slot of its first token
    i64 length;  // how many tokens it has
    i64 first;   // where they begin among the tokens of all sequences

    // How many keys token t sees, its own the last, and the slot of the first.
    i64 end(i64 t) const { return start + t + 1; }
    i64 begin(i64 t, i64 window) const { return window > 0 ? std::max<i64>(0, end(t) - window) : 0; }
};

struct Sequences {
    const Sequence* p;
    i64 count;

    const Sequence* begin() const { return p; }
    const Sequence* end() const { return p + count; }
    // How many slots they reach.
    i64 slots() const {
        i64 most = 0;
        for (const Sequence& s : *this) most = std::max(most, s.start + s.length);
        return most;
    }
    // Whether they are M tokens of a cache's rows without a gap.
    bool fits(i64 rows, i64 M) const {
        i64 first = 0;
        for (const Sequence& s : *this) {
            if (s.row < 0 || s.row >= rows || s.start < 0 || s.length <= 0 || s.length > M || s.first != first) return false;
            first += s.length;
        }
        return first == M;
    }
};

// Keys are summed in parts that their slots alone define, and the parts one behind the other. So what
// a query makes of them is the same whoever shares the batch, and however threads share the work. A
// part has 256 slots, or an eighth of what lies before it.
constexpr i64 PART = 256, EVEN_PARTS = 16, PARTS_OF_OCTAVE = 8;

inline i64 part_of(i64 slot) {
    if (slot < PART * EVEN_PARTS) return slot / PART;
    i64 octave = 0;
    while (slot >= 2 * PART * EVEN_PARTS << octave) ++octave;
    const i64 begin = PART * EVEN_PARTS << octave;
    return EVEN_PARTS + PARTS_OF_OCTAVE * octave + (slot - begin) / (begin / PARTS_OF_OCTAVE);
}
inline i64 part_start(i64 part) {
    if (part < EVEN_PARTS) return PART * part;
    const i64 octave = (part - EVEN_PARTS) / PARTS_OF_OCTAVE, begin = PART * EVEN_PARTS << octave;
    return begin + (part - EVEN_PARTS) % PARTS_OF_OCTAVE * (begin / PARTS_OF_OCTAVE);
}

// The parts in which the keys [begin, end) lie.
struct Parts {
    i64 begin, end, first, count;

    Parts(i64 begin, i64 end) : begin(begin), end(end), first(part_of(begin)), count(part_of(end - 1) - first + 1) {}
    i64 from(i64 i) const { return std::max(begin, part_start(first + i)); }
    i64 to(i64 i) const { return std::min(end, part_start(first + i + 1)); }
};

}  // namespace quintet
