// The MLP of a block that layers share, on what its attention left beside the hidden states:
// L down(gelu(gate) · up), of which gate and up are one map with an addition, and L is the layer's own.
#pragma once
#include "adapted.h"

namespace quintet {

template <class Matrix, class T>
class SharedMLPPart {
  public:
    struct Fields {
        QUINTET_FIELDS(norm, gate_up, down, linear)
        Norm norm;
        Adapted gate_up;
        Weight down, linear;
    };
    using Held = void;

    static bool fits(const Fields& f, const Held*, const Tokens& s) {
        const i64 O = f.gate_up.map.O, I = f.norm.width(s.C);
        return O % 2 == 0 && f.norm.template fits<T>(s.C) && f.gate_up.template fits<Matrix, T>(O, I) &&
               f.down.O == s.C && f.down.template fits<Matrix, T>(O / 2) && f.linear.O == s.C &&
               f.linear.template fits<Matrix, T>(s.C);
    }

    SharedMLPPart(const Fields& f, const Held*, const Tokens& s, i64, Room& room)
        : f_(f), s_(s), F_(f.gate_up.map.O / 2), maps_(&f.gate_up, s.all(), room),
          hidden_(room.take<T>(s.all() * F_)), made_(room.take<T>(s.all() * s.C)) {}

    void run(Member<Matrix, T>& me) {
        const Normed<Matrix, T> normed(me, f_.norm);
        maps_.run(me, normed.inputs, normed.width);
        const Share mine = me.share(F_);
        for (i64 m = 0; m < s_.all(); ++m) {
            const T *gate = maps_[0] + m * 2 * F_ + mine.from, *up = gate + F_;
            T* to = hidden_ + m * F_ + mine.from;
            const i64 n = mine.to - mine.from;
            each_vector<T>(n, [&](i64 i, auto last) {
                const F activated = round_to(gelu(get(gate, i, n, last)), gate);
                set(to, i, n, mul(activated, get(up, i, n, last)), last);
            });
        }
#pragma omp barrier
        const Map<T> down = map_of(f_.down, made_);
        me.map(&down, 1, taken_in<Matrix>(hidden_, s_.all(), F_), F_);
#pragma omp barrier
        const Map<T> linear = map_of(f_.linear, static_cast<T*>(s_.beside));
        me.map(&linear, 1, taken_in<Matrix>(made_, s_.all(), s_.C), s_.C);
#pragma omp barrier
    }

  private:
    const Fields& f_;
    const Tokens& s_;
    const i64 F_;
    AdaptedMaps<Matrix, T, 1> maps_;
    T *const hidden_, *const made_;
};

}  // namespace quintet
