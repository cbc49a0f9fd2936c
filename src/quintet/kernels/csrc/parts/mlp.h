// The gated MLP, down(silu(gate(n)) · up(n)).
#pragma once
#include "../gated.h"
#include "part.h"

namespace quintet {

template <class Matrix, class T>
class MLPPart {
  public:
    struct Fields {
        QUINTET_FIELDS(norm, gate, up, down, F)
        Norm norm;
        Weight gate, up, down;
        i64 F;
    };
    using Held = void;

    static bool fits(const Fields& f, const Held*, const Tokens& s) {
        return f.norm.width(s.C) == s.C && f.norm.template fits<T>(s.C) && f.gate.O == f.F && f.up.O == f.F &&
               f.down.O == s.C && f.gate.template fits<Matrix, T>(s.C) && f.up.template fits<Matrix, T>(s.C) &&
               f.down.template fits<Matrix, T>(f.F);
    }

    MLPPart(const Fields& f, const Held*, const Tokens& s, i64, Room& room)
        : f_(f), s_(s), hidden_(room.take<T>(s.all() * f.F)), added_(room.take<T>(s.all() * s.C)) {}

    void run(Member<Matrix, T>& me) {
        const Normed<Matrix, T> normed(me, f_.norm);
        const Share mine = me.share(f_.F);
        if (mine.from < mine.to)
            gate_rows(matrix_of<Matrix, T>(f_.gate, s_.C), matrix_of<Matrix, T>(f_.up, s_.C),
                      normed.inputs.of.data(), s_.all(), mine.from, mine.to, hidden_, f_.F, me.made);
#pragma omp barrier
        me.add(f_.down, taken_in<Matrix>(hidden_, s_.all(), f_.F), f_.F, added_, me.x());
    }

  private:
    const Fields& f_;
    const Tokens& s_;
    T *const hidden_, *const added_;
};

}  // namespace quintet
