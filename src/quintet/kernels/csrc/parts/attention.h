// Grouped-query attention, over keys and values in the buffers of a cache.
#pragma once
#include "../decode.h"
#include "adapted.h"

namespace {

template <class Matrix, class T>
class AttentionPart {
  public:
    struct Fields {
        Norm norm;
        Adapted qkv[3];
        Weight o;
        i64 H, K, D, window, rotates, beside;
        double scale;
    };
    struct Held {
        Buffer keys, values;
    };

    static bool fits(const Fields& f, const Held* held, const Tokens& s) {
        const i64 I = f.norm.width(s.C), heads[] = {f.H, f.K, f.K};
        if (f.K <= 0 || f.H <= 0 || f.H % f.K || f.D <= 0 || f.D % 16 || f.window < 0) return false;
        for (int i = 0; i < 3; ++i)
            if (f.qkv[i].adapts() != f.qkv[0].adapts() || !f.qkv[i].template fits<Matrix, T>(heads[i] * f.D, I))
                return false;
        return f.norm.template fits<T>(s.C) && f.o.O == s.C && f.o.template fits<Matrix, T>(f.H * f.D) &&
               (!f.rotates || s.D == f.D) && held->keys.template fits<T>(s.B, f.K, s.end(), f.D) &&
               held->values.template fits<T>(s.B, f.K, s.end(), f.D);
    }

    AttentionPart(const Fields& f, const Held* held, const Tokens& s, i64 threads, Room& room)
        : f_(f), held_(held), s_(s),
          // More than `parts_of` ever asks for.
          most_(std::max(threads, 2 * (threads + s.B * f.K) * s.T)),
          maps_(f.qkv, s.all(), room), q_(maps_[0]), k_(maps_[1]), v_(maps_[2]),
          attended_(room.take<T>(s.all() * f.H * f.D)),
          added_(room.take<T>(s.all() * s.C)),
          sums_(room.take<float>(most_ * Partial::room(f.H / f.K, f.D))) {}

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

    i64 seen(i64 b, i64 t) const {
        const i64 end = s_.starts[b] + t + 1;
        return f_.window ? std::min(end, f_.window) : end;
    }

    // Rotate queries and keys of a row and key head, and put its keys and values into the cache.
    void place(i64 b, i64 kv) {
        const i64 G = group(), D = f_.D;
        T* keys = held_->keys.template of<T>(b, kv);
        T* values = held_->values.template of<T>(b, kv);
        for (i64 t = 0; t < s_.T; ++t) {
            const i64 m = b * s_.T + t, slot = s_.starts[b] + t;
            const T* cos = static_cast<const T*>(s_.cos) + b * s_.angle_row + t * D;
            const T* sin = static_cast<const T*>(s_.sin) + b * s_.angle_row + t * D;
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

    void attend_part(i64 b, i64 t, i64 kv, i64 split, i64 splits, Partial part) {
        const i64 G = group(), D = f_.D, m = b * s_.T + t, n = seen(b, t);
        const i64 first = s_.starts[b] + t + 1 - n;
        const Queries<T> queries{
            q_ + (m * f_.H + kv * G) * D,
            held_->keys.template of<T>(b, kv), held_->values.template of<T>(b, kv),
            D, held_->keys.token, held_->values.token, G, D};
        const Share mine(n, split, splits);
        part.clear();
        attend(queries, first + mine.from, first + mine.to, float(f_.scale), part);
    }

    void merge_into(i64 b, i64 t, i64 kv, i64 first, i64 splits) {
        std::vector<Partial> parts;
        for (i64 i = 0; i < splits; ++i) parts.push_back(sums(first + i));
        merge(parts.data(), splits, group(), f_.D,
              attended_ + ((b * s_.T + t) * f_.H + kv * group()) * f_.D);
    }

    // Every thread calls it, and waits at its end.
    void attend_all(const Member<Matrix, T>& me) {
        const i64 units = s_.B * f_.K;
        i64 longest = 0;
        for (i64 b = 0; b < s_.B; ++b) longest = std::max(longest, seen(b, s_.T - 1));
        const i64 splits = parts_of(units, me.threads, longest);
        const Share mine = me.share(units);
        for (i64 unit = mine.from; unit < mine.to; ++unit) {
            const i64 b = unit / f_.K, kv = unit % f_.K;
            place(b, kv);
            if (splits > 1) continue;
            for (i64 t = 0; t < s_.T; ++t) {
                attend_part(b, t, kv, 0, 1, sums(me.thread));
                merge_into(b, t, kv, me.thread, 1);
            }
        }
#pragma omp barrier
        if (splits == 1) return;
        const Share items = me.share(units * s_.T * splits);
        for (i64 at = items.from; at < items.to; ++at) {
            const i64 item = at / splits, unit = item / s_.T;
            attend_part(unit / f_.K, item % s_.T, unit % f_.K, at % splits, splits, sums(at));
        }
#pragma omp barrier
        const Share merged = me.share(units * s_.T);
        for (i64 item = merged.from; item < merged.to; ++item) {
            const i64 unit = item / s_.T;
            merge_into(unit / f_.K, item % s_.T, unit % f_.K, item * splits, splits);
        }
#pragma omp barrier
    }

    const Fields& f_;
    const Held* const held_;
    const Tokens& s_;
    const i64 most_;
    AdaptedMaps<Matrix, T, 3> maps_;
    T *const q_, *const k_, *const v_, *const attended_, *const added_;
    float* const sums_;
};

}  // namespace
