// Latent attention in the space of the latents, over latents and keys in the buffers of a cache.
#pragma once
#include "../latent.h"
#include "part.h"

namespace quintet {

template <class Matrix>
class LatentPart {
  public:
    struct Fields {
        QUINTET_FIELDS(norm, q_a, q_norm, q, kv, kv_norm, o, w, H, Dn, Dr, Dv, R, neighbours, scale)
        Norm norm;
        Weight q_a;  // of zeros where queries have no latent of their own
        Norm q_norm;
        Weight q, kv;
        Norm kv_norm;
        Weight o;
        Span<const bf16> w;  // (H, Dn + Dv, R)
        i64 H, Dn, Dr, Dv, R, neighbours;
        double scale;
    };
    struct Held {
        QUINTET_FIELDS(latents, keys)
        Buffer latents, keys;
    };

    static bool fits(const Fields& f, const Held* held, const Tokens& s) {
        const i64 C = s.C, Dn = f.Dn, Dr = f.Dr;
        const bool ranked = f.q_a.w.given(), even = Dn % 2 == 0 && Dr % 2 == 0 && f.R % WIDEST == 0;
        if (f.H <= 0 || Dn <= 0 || Dr <= 0 || f.Dv <= 0 || f.R <= 0 || !even || s.D != Dr) return false;
        if (ranked && !(f.q_a.template fits<Matrix, bf16>(C) && f.q_norm.weight.template as<bf16>().holds(f.q_a.O)))
            return false;
        return f.norm.width(C) == C && f.norm.template fits<bf16>(C) && f.q.O == f.H * (Dn + Dr) &&
               f.q.template fits<Matrix, bf16>(ranked ? f.q_a.O : C) && f.kv.O == f.R + Dr &&
               f.kv.template fits<Matrix, bf16>(C) && f.kv_norm.weight.template as<bf16>().holds(f.R) && f.o.O == C &&
               f.o.template fits<Matrix, bf16>(f.H * f.Dv) && f.w.holds(f.H * (Dn + f.Dv) * f.R) &&
               held->latents.template fits<bf16>(s, 1, f.R) &&
               held->keys.template fits<bf16>(s, 1, Dr);
    }

    LatentPart(const Fields& f, const Held* held, const Tokens& s, i64 threads, Room& room)
        : f_(f), held_(held), s_(s),
          q_row_(f.H * (f.Dn + f.Dr)),
          c_q_(room.take<bf16>(s.all() * f.q_a.O)),
          q_(room.take<bf16>(s.all() * q_row_)),
          q_pe_(room.take<bf16>(s.all() * f.H * f.Dr)),
          kv_(room.take<bf16>(s.all() * f.kv.O)),
          q_latent_(room.take<bf16>(s.all() * f.H * f.R)),
          mixed_(room.take<bf16>(s.all() * f.H * f.R)),
          attended_(room.take<bf16>(s.all() * f.H * f.Dv)),
          added_(room.take<bf16>(s.all() * s.C)),
          latent_(over_all_rows()),
          division_(latent_.attention(), threads),
          sums_(room.take<float>(division_.room())) {}

    void run(Member<Matrix, bf16>& me) {
        map_in(me);
        place(me);
        // It begins with what needs neither positions nor the cache, and then waits for all.
        attend(latent_, float(f_.scale), division_, sums_);
        const i64 I = f_.H * f_.Dv;
        me.add(f_.o, taken_in<Matrix>(attended_, s_.all(), I), I, added_, me.x());
    }

  private:
    Latent over_all_rows() const {
        const i64 head = f_.Dn + f_.Dr;
        const Buffer &latents = held_->latents, &keys = held_->keys;
        return {1, s_.M, s_.sequences.slots(), f_.H, f_.Dn, f_.Dr, f_.Dv, f_.R, 1,
                q_, q_pe_, latents.of<bf16>(0, 0), keys.of<bf16>(0, 0), f_.w,
                q_latent_, mixed_, attended_,
                {q_row_, head, q_row_}, {f_.H * f_.Dr, f_.Dr, f_.H * f_.Dr},
                {latents.row, 0, latents.token}, {keys.row, 0, keys.token}, s_.sequences};
    }

    // Queries of all heads, and the latents with their keys.
    void map_in(Member<Matrix, bf16>& me) {
        const Normed<Matrix, bf16> normed(me, f_.norm);
        const Map<bf16> first[] = {f_.q_a.w.p ? map_of(f_.q_a, c_q_) : map_of(f_.q, q_), map_of(f_.kv, kv_)};
        me.map(first, 2, normed.inputs, s_.C);
#pragma omp barrier
        if (!f_.q_a.w.p) return;
        const i64 M = s_.all(), rank = f_.q_a.O;
        std::vector<bf16> unit(size_t(M * rank));
        for (i64 m = 0; m < M; ++m)
            normalise(c_q_ + m * rank, f_.q_norm.template scale<bf16>(), unit.data() + m * rank, rank,
                      float(f_.q_norm.eps));
        const Map<bf16> second = map_of(f_.q, q_);
        me.map(&second, 1, taken_in<Matrix>(unit.data(), M, rank), rank);
#pragma omp barrier
    }

    // Rotate queries and keys, and put latents and keys into the cache.
    void place(const Member<Matrix, bf16>& me) const {
        const Share heads = me.share(s_.all() * f_.H), tokens = me.share(s_.all());
        for (i64 at = heads.from; at < heads.to; ++at)
            rotate(q_ + at / f_.H * q_row_ + at % f_.H * (f_.Dn + f_.Dr) + f_.Dn, q_pe_ + at * f_.Dr, at / f_.H);
        for (const Sequence& of : s_.sequences)
            for (i64 m = std::max(tokens.from, of.first); m < std::min(tokens.to, of.first + of.length); ++m) {
                const i64 slot = of.start + m - of.first;
                const bf16* from = kv_ + m * f_.kv.O;
                normalise(from, f_.kv_norm.template scale<bf16>(),
                          held_->latents.template of<bf16>(of.row, 0) + slot * held_->latents.token, f_.R,
                          float(f_.kv_norm.eps));
                rotate(from + f_.R, held_->keys.template of<bf16>(of.row, 0) + slot * held_->keys.token, m);
            }
    }

    void rotate(const bf16* from, bf16* to, i64 m) const {
        const bf16 *cos = s_.cos_of<bf16>(m), *sin = s_.sin_of<bf16>(m);
        if (f_.neighbours) rotate_neighbours(from, to, cos, sin, f_.Dr);
        else rotate_head(from, to, cos, sin, f_.Dr);
    }

    const Fields& f_;
    const Held* const held_;
    const Tokens& s_;
    const i64 q_row_;
    bf16 *const c_q_, *const q_, *const q_pe_, *const kv_, *const q_latent_, *const mixed_, *const attended_, *const added_;
    const Latent latent_;
    const Division division_;
    float* const sums_;
};

}  // namespace quintet
