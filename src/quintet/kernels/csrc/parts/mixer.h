// Mamba-2's mixer with its projections, over a window and a state that are changed in place.
#pragma once
#include "../ssm.h"
#include "part.h"

namespace quintet {

template <class Matrix, class T>
class MixerPart {
  public:
    struct Fields {
        QUINTET_FIELDS(norm, in, out, taps, bias, dt_bias, a_log, d, gated, H, P, G, N, W, least, most)
        Norm norm;
        Weight in, out;
        Span<const T> taps, bias;
        Span<const float> dt_bias, a_log, d;
        Norm gated;
        i64 H, P, G, N, W;
        double least, most;

        Shape shape() const { return {H, P, G, N, W}; }
    };
    struct Held {
        QUINTET_FIELDS(window, state, record)
        Span<T> window;
        Span<float> state;
        Span<T> record;  // where projected tokens are left for whoever goes back; or none
    };

    static bool fits(const Fields& f, const Held* held, const Tokens& s) {
        const Shape shape = f.shape();
        return shape.fits() && f.norm.width(s.C) == s.C && f.norm.template fits<T>(s.C) && f.in.O == shape.row() &&
               f.in.template fits<Matrix, T>(s.C) && f.out.O == s.C &&
               f.out.template fits<Matrix, T>(shape.inner()) && f.taps.holds(shape.conv() * f.W) &&
               (!f.bias.given() || f.bias.holds(shape.conv())) && f.dt_bias.holds(f.H) && f.a_log.holds(f.H) &&
               f.d.holds(f.H) && f.gated.weight.template as<T>().holds(shape.inner()) &&
               held->window.holds(s.rows * (f.W - 1) * shape.conv()) && held->state.holds(s.rows * f.H * f.P * f.N) &&
               (!held->record.given() || held->record.holds(s.all() * shape.row()));
    }

    MixerPart(const Fields& f, const Held* held, const Tokens& s, i64, Room& room)
        : f_(f), s_(s),
          numbers_{float(f.least), float(f.most), float(f.gated.eps)},
          shape_(f.shape()),
          projected_(held->record.given() ? held->record.p : room.take<T>(s.all() * shape_.row())),
          mixed_(room.take<T>(s.all() * shape_.inner())),
          added_(room.take<T>(s.all() * s.C)),
          mixer_{shape_, s.M, s.sequences, nullptr, projected_, f.taps, f.bias, held->window, held->window,
                 f.dt_bias, f.a_log, f.d, held->state,
                 room.take<float>(s.all() * shape_.conv()), room.take<float>(s.all() * f.H),
                 room.take<float>(s.all() * shape_.inner()),
                 f.gated.template scale<T>(), mixed_, numbers_} {}

    void run(Member<Matrix, T>& me) {
        {
            const Normed<Matrix, T> normed(me, f_.norm);
            const Map<T> in = map_of(f_.in, projected_);
            me.map(&in, 1, normed.inputs, s_.C);
        }
#pragma omp barrier
        mixer_.run(me.thread, me.threads);
#pragma omp barrier
        const auto inputs = taken_in<Matrix>(mixed_, s_.all(), shape_.inner());
        me.add(f_.out, inputs, shape_.inner(), added_, me.x());
    }

  private:
    const Fields& f_;
    const Tokens& s_;
    const float numbers_[3];
    const Shape shape_;
    T *const projected_, *const mixed_, *const added_;
    const Mixer<T> mixer_;
};

}  // namespace quintet
