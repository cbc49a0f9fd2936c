// The norm behind the last layer: x = norm(x).
#pragma once
#include "part.h"

namespace quintet {

template <class Matrix, class T>
class FinalNormPart {
  public:
    struct Fields {
        QUINTET_FIELDS(norm)
        Norm norm;
    };
    using Held = void;

    static bool fits(const Fields& f, const Held*, const Tokens& s) {
        return f.norm.width(s.C) == s.C && f.norm.template fits<T>(s.C);
    }

    FinalNormPart(const Fields& f, const Held*, const Tokens& s, i64, Room&) : norm_(f.norm), s_(s) {}

    void run(Member<Matrix, T>& me) {
        const Share mine = me.share(s_.all());
        for (i64 m = mine.from; m < mine.to; ++m) {
            T* x = me.x() + m * s_.C;
            normalise(x, norm_.template scale<T>(), x, s_.C, float(norm_.eps));
        }
#pragma omp barrier
    }

  private:
    const Norm& norm_;
    const Tokens& s_;
};

}  // namespace quintet
