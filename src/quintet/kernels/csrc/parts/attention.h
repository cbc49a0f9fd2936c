// Grouped-query attention, over keys and values in the buffers of a cache.
#pragma once
#include "../decode.h"
#include "adapted.h"

namespace quintet {

// Below so many keys, waiting for other threads takes longer than they save.
constexpr i64 FEW_KEYS = 512;

template <class Matrix, class T>
class AttentionPart {
  public:
    struct Fields {
        QUINTET_FIELDS(norm, qkv, o, H, K, D, window, rotates, beside, scale)
        Norm norm;
        Adapted qkv[3];
        Weight o;
        i64 H, K, D, window, rotates, beside;
        double scale;
    };
    struct Held {
        QUINTET_FIELDS(keys, values)
        Buffer keys, values;
    };

    static bool fits(const Fields& f, const Held* held, const Tokens& s) {
        const i64 I = f.norm.width(s.C), heads[] = {f.H, f.K, f.K};
        if (f.K <= 0 || f.H <= 0 || f.H % f.K || f.D <= 0 || f.D % 16 || f.window < 0) return false;
        for (int i = 0; i < 3; ++i)
            if (f.qkv[i].adapts() != f.qkv[0].adapts() || !f.qkv[i].template fits<Matrix, T>(heads[i] * f.D, I))
                return false;
        return f.norm.template fits<T>(s.C) && f.o.O == s.C && f.o.template fits<Matrix, T>(f.H * f.D) &&
               (!f.rotates || s.D == f.D) && held->keys.template fits<T>(s, f.K, f.D) &&
               held->values.template fits<T>(s, f.K, f.D);
    }

    AttentionPart(const Fields& f, const Held* held, const Tokens& s, i64 threads, Room& room)
        : f_(f), held_(held), s_(s), threads_(threads), splits_(uneven()),
          maps_(f.qkv, s.all(), room), q_(maps_[0]), k_(maps_[1]), v_(maps_[2]),
          attended_(room.take<T>(s.all() * f.H * f.D)),
          added_(room.take<T>(s.all() * s.C)),
          sums_(room.take<float>((2 * threads + (splits_ ? all_parts() : 0)) * Partial::room(f.H / f.K, f.D))) {}

    void run(Member<Matrix, T>& me) {
        const Normed<Matrix, T> normed(me, f_.norm);
        maps_.run(me, normed.inputs, normed.width);
        attend_all(me);
        const auto inputs = taken_in<Matrix>(attended_, s_.all(), f_.H * f_.D);
        if (!f_.beside) return me.add(f_.o, inputs, f_.H * f_.D, added_, me.x());
        const Map<T> o = map_of(f_.o, static_cast<T*>(s_.beside));
        me.map(&o, 1, inputs, f_.H * f_.D);
#pragma omp barrier
    }

  private:
    i64 group() const { return f_.H / f_.K; }
    Partial sums(i64 at) const {
        return Partial(sums_ + at * Partial::room(group(), f_.D), group(), f_.D);
    }

    Parts parts(const Sequence& of, i64 t) const { return Parts(of.begin(t, f_.window), of.end(t)); }
    i64 parts_of(const Sequence& of) const {
        i64 all = 0;
        for (i64 t = 0; t < of.length; ++t) all += parts(of, t).count;
        return all;
    }
    i64 all_parts() const {
        i64 all = 0;
        for (const Sequence& of : s_.sequences) all += f_.K * parts_of(of);
        return all;
    }

    // A key head of a sequence is a unit. Those of one head stand beside each other, so that threads
    // have equal shares where there are heads enough.
    i64 units() const { return f_.K * s_.sequences.count; }
    const Sequence& sequence(i64 unit) const { return s_.sequences.p[unit % s_.sequences.count]; }
    i64 head(i64 unit) const { return unit / s_.sequences.count; }

    // Whether a thread would have to wait for another if it were whole units that they share.
    bool uneven() const {
        i64 total = 0, most = 0;
        for (i64 thread = 0; thread < threads_; ++thread) {
            const Share mine(units(), thread, threads_);
            i64 keys = 0;
            for (i64 unit = mine.from; unit < mine.to; ++unit) keys += sequence(unit).length * (sequence(unit).end(0) - sequence(unit).begin(0, f_.window));
            total += keys, most = std::max(most, keys);
        }
        return total > FEW_KEYS && 4 * most * threads_ > 5 * total;
    }

    // Rotate queries and keys of a unit, and put its keys and values into the cache.
    void place(const Sequence& of, i64 kv) {
        const i64 G = group(), D = f_.D;
        T* keys = held_->keys.template of<T>(of.row, kv);
        T* values = held_->values.template of<T>(of.row, kv);
        for (i64 t = 0; t < of.length; ++t) {
            const i64 m = of.first + t, slot = of.start + t;
            const T *cos = s_.template cos_of<T>(m), *sin = s_.template sin_of<T>(m);
            for (i64 g = 0; g < G && f_.rotates; ++g) {
                T* head = q_ + (m * f_.H + kv * G + g) * D;
                rotate_head(head, head, cos, sin, D);
            }
            const T* key = k_ + (m * f_.K + kv) * D;
            T* to = keys + slot * held_->keys.token;
            if (f_.rotates) rotate_head(key, to, cos, sin, D);
            else std::copy(key, key + D, to);
            const T* value = v_ + (m * f_.K + kv) * D;
            std::copy(value, value + D, values + slot * held_->values.token);
        }
    }

    Queries<T> queries(const Sequence& of, i64 t, i64 kv) const {
        const i64 G = group(), D = f_.D;
        return {q_ + ((of.first + t) * f_.H + kv * G) * D,
                held_->keys.template of<T>(of.row, kv), held_->values.template of<T>(of.row, kv),
                D, held_->keys.token, held_->values.token, G, D};
    }
    T* out(const Sequence& of, i64 t, i64 kv) const {
        return attended_ + ((of.first + t) * f_.H + kv * group()) * f_.D;
    }

    // Every thread calls it, and waits at its end.
    void attend_all(const Member<Matrix, T>& me) {
        const Share mine = me.share(units());
        Partial sum = sums(2 * me.thread), part = sums(2 * me.thread + 1);
        for (i64 unit = mine.from; unit < mine.to; ++unit) {
            const Sequence& of = sequence(unit);
            place(of, head(unit));
            for (i64 t = 0; !splits_ && t < of.length; ++t) {
                attend(queries(of, t, head(unit)), parts(of, t), float(f_.scale), sum, part);
                sum.finish(out(of, t, head(unit)));
            }
        }
#pragma omp barrier
        if (!splits_) return;
        // All parts of all tokens, in the order in which they lie in memory.
        const Share some = me.share(all_parts());
        each_token([&](const Sequence& of, i64 t, i64 kv, i64 first) {
            const Parts all = parts(of, t);
            for (i64 i = std::max<i64>(0, some.from - first); i < std::min(all.count, some.to - first); ++i) {
                Partial made = sums(2 * threads_ + first + i);
                made.clear();
                attend(queries(of, t, kv), all.from(i), all.to(i), float(f_.scale), made);
            }
        });
#pragma omp barrier
        const Share merged = me.share(s_.M * f_.K);
        i64 at = 0;
        each_token([&](const Sequence& of, i64 t, i64 kv, i64 first) {
            const i64 item = at++;
            if (item < merged.from || item >= merged.to) return;
            sum.clear();
            for (i64 i = 0; i < parts(of, t).count; ++i) sum.add(sums(2 * threads_ + first + i));
            sum.finish(out(of, t, kv));
        });
#pragma omp barrier
    }

    // fn(sequence, token, key head, the first of its parts among all).
    template <class Fn>
    void each_token(Fn&& fn) const {
        i64 first = 0;
        for (const Sequence& of : s_.sequences)
            for (i64 t = 0; t < of.length; ++t)
                for (i64 kv = 0; kv < f_.K; ++kv) {
                    fn(of, t, kv, first);
                    first += parts(of, t).count;
                }
    }

    const Fields& f_;
    const Held* const held_;
    const Tokens& s_;
    const i64 threads_;
    const bool splits_;
    AdaptedMaps<Matrix, T, 3> maps_;
    T *const q_, *const k_, *const v_, *const attended_, *const added_;
    float* const sums_;
};

}  // namespace quintet
