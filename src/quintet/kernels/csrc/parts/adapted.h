// Maps with low-rank additions of their own: y = W n + U (D n).
#pragma once
#include "part.h"

namespace quintet {

// D and U are null where there is no addition.
struct Adapted {
    QUINTET_FIELDS(map, down, up)
    Weight map, down, up;

    bool adapts() const { return down.w.given(); }
    template <class Matrix, class T>
    bool fits(i64 O, i64 I) const {
        return map.O == O && map.fits<Matrix, T>(I) &&
               (!adapts() || (up.O == O && down.fits<Matrix, T>(I) && up.fits<Matrix, T>(down.O)));
    }
};

// Several of the same vectors, all with an addition or none.
template <class Matrix, class T, int N>
class AdaptedMaps {
  public:
    AdaptedMaps(const Adapted* maps, i64 M, Room& room) : maps_(maps), M_(M) {
        for (int i = 0; i < N; ++i) {
            made_[i] = room.take<T>(M * maps[i].map.O);
            low_[i] = room.take<T>(M * maps[i].down.O);
            added_[i] = room.take<T>(M * maps[i].up.O);
        }
    }

    T* operator[](int i) const { return made_[i]; }

    // All see it behind this.
    void run(Member<Matrix, T>& me, const Inputs<Matrix>& inputs, i64 I) {
        const bool adapts = maps_[0].adapts();
        Map<T> all[2 * N];
        for (int i = 0; i < N; ++i) {
            all[i] = map_of(maps_[i].map, made_[i]);
            all[N + i] = map_of(maps_[i].down, low_[i]);
        }
        me.map(all, adapts ? 2 * N : N, inputs, I);
#pragma omp barrier
        if (!adapts) return;
        for (int i = 0; i < N; ++i) {
            const i64 rank = maps_[i].down.O;
            const Map<T> up = map_of(maps_[i].up, added_[i]);
            me.map(&up, 1, taken_in<Matrix>(low_[i], M_, rank), rank);
            me.add(added_[i], made_[i], up.O());
        }
#pragma omp barrier
    }

  private:
    const Adapted* const maps_;
    const i64 M_;
    T *made_[N], *low_[N], *added_[N];
};

}  // namespace quintet
