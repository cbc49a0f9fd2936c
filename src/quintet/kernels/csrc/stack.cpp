// All layers of a dense decoder for few tokens, in one call: what waiting for the next call and the
// next team of threads takes is most of what a small model's step takes beside its weights.
//
// A layer is x += o(attention(norm(x))), x += down(silu(gate(n)) · up(n)) with n = norm(x). Results
// are rounded where the layer's own modules round them.
#include <omp.h>

#include "decode.h"
#include "gated.h"
#include "linear.h"
#include "rows.h"

namespace {

// A weight as Python fills it in: eight bytes a field.
struct Weight {
    const void *w, *scale, *bias;
    i64 O, stride;
};

struct Layer {
    const void *attention_norm, *mlp_norm;
    Weight q, k, v, o, gate, up, down;
    i64 window;
};

// Keys or values (B, K, S, D).
struct Buffer {
    void* p;
    i64 row, head, token;

    template <class T>
    T* of(i64 b, i64 kv) const { return static_cast<T*>(p) + b * row + kv * head; }
};

struct Held {
    Buffer keys, values;
};

struct Stack {
    const Layer* layers;
    const Held* held;
    void* x;                // (B, T, C), in and out
    const void *cos, *sin;  // (B or 1, T, D)
    const i64* starts;      // (B) the slot of each row's first token
    i64 count, angle_row, B, T, C, F, H, K, D;
};

template <class T>
Map<T> map_of(const Weight& w, T* y) {
    return {w.w, w.scale, static_cast<const T*>(w.bias), y, w.O, w.stride};
}

// What the threads of a step share.
template <class Matrix, class T>
struct Step {
    const Stack& s;
    const float eps, scale;
    const i64 M = s.B * s.T;
    T* x = static_cast<T*>(s.x);
    std::vector<T> q{room(s.H * s.D)}, k{room(s.K * s.D)}, v{room(s.K * s.D)};
    std::vector<T> attended{room(s.H * s.D)}, hidden{room(s.F)}, added{room(s.C)};
    std::vector<Partial> parts;

    std::vector<T> room(i64 width) const { return std::vector<T>(size_t(M * width)); }
    i64 units() const { return s.B * s.K; }

    i64 seen(const Layer& layer, i64 b, i64 t) const {
        const i64 end = s.starts[b] + t + 1;
        return layer.window ? std::min(end, layer.window) : end;
    }

    // Rotate queries and keys of a row and key head, and put its keys and values into the cache.
    void place(const Held& held, i64 b, i64 kv) {
        const i64 G = s.H / s.K, D = s.D;
        T* keys = held.keys.of<T>(b, kv);
        T* values = held.values.of<T>(b, kv);
        for (i64 t = 0; t < s.T; ++t) {
            const i64 m = b * s.T + t, slot = s.starts[b] + t;
            const T* cos = static_cast<const T*>(s.cos) + b * s.angle_row + t * D;
            const T* sin = static_cast<const T*>(s.sin) + b * s.angle_row + t * D;
            for (i64 g = 0; g < G; ++g) {
                T* head = q.data() + (m * s.H + kv * G + g) * D;
                rotate_head(head, head, cos, sin, D);
            }
            rotate_head(k.data() + (m * s.K + kv) * D, keys + slot * held.keys.token, cos, sin, D);
            const T* value = v.data() + (m * s.K + kv) * D;
            std::copy(value, value + D, values + slot * held.values.token);
        }
    }

    void attend_part(const Layer& layer, const Held& held, i64 b, i64 t, i64 kv, i64 split, i64 splits, Partial& part) {
        const i64 G = s.H / s.K, D = s.D, m = b * s.T + t, n = seen(layer, b, t);
        const i64 first = s.starts[b] + t + 1 - n;
        const Queries<T> queries{
            q.data() + (m * s.H + kv * G) * D,
            held.keys.of<T>(b, kv), held.values.of<T>(b, kv),
            D, held.keys.token, held.values.token, G, D};
        const Share mine(n, split, splits);
        part.clear();
        attend(queries, first + mine.from, first + mine.to, scale, part);
    }

    T* attended_by(i64 b, i64 t, i64 kv) {
        return attended.data() + ((b * s.T + t) * s.H + kv * (s.H / s.K)) * s.D;
    }

    // Attention of all rows; every thread calls it, and waits at its end.
    void attention(const Layer& layer, const Held& held, i64 thread, i64 threads) {
        const i64 G = s.H / s.K;
        i64 longest = 0;
        for (i64 b = 0; b < s.B; ++b) longest = std::max(longest, seen(layer, b, s.T - 1));
        const i64 splits = parts_of(units(), threads, longest);
        const Share mine(units(), thread, threads);
        for (i64 unit = mine.from; unit < mine.to; ++unit) {
            const i64 b = unit / s.K, kv = unit % s.K;
            place(held, b, kv);
            if (splits > 1) continue;
            Partial& part = parts[size_t(thread)];
            for (i64 t = 0; t < s.T; ++t) {
                attend_part(layer, held, b, t, kv, 0, 1, part);
                merge(&part, 1, G, s.D, attended_by(b, t, kv));
            }
        }
#pragma omp barrier
        if (splits == 1) return;
        const i64 all = units() * s.T;
        const Share items(all * splits, thread, threads);
        for (i64 at = items.from; at < items.to; ++at) {
            const i64 item = at / splits, unit = item / s.T;
            attend_part(layer, held, unit / s.K, item % s.T, unit % s.K, at % splits, splits,
                        parts[size_t(at)]);
        }
#pragma omp barrier
        const Share merged(all, thread, threads);
        for (i64 item = merged.from; item < merged.to; ++item) {
            const i64 unit = item / s.T;
            merge(&parts[size_t(item * splits)], splits, G, s.D,
                  attended_by(unit / s.K, item % s.T, unit % s.K));
        }
#pragma omp barrier
    }

    // x += W of `inputs`, by the rows that are this thread's; ends with a barrier.
    void add(const Weight& w, const Inputs<Matrix>& inputs, i64 I, i64 thread, i64 threads,
             std::vector<float>& made) {
        const Map<T> map = map_of(w, added.data());
        map_rows<Matrix>(&map, 1, inputs.of.data(), M, I, thread, threads, made);
        const Share mine(s.C, thread, threads);
        for (i64 m = 0; m < M; ++m)
            for (i64 i = m * s.C + mine.from; i < m * s.C + mine.to; ++i)
                narrow(widen(x[i]) + widen(added[size_t(i)]), x + i);
#pragma omp barrier
    }

    void run(i64 thread, i64 threads) {
        // What every thread makes for itself is there without waiting for the others.
        std::vector<T> normed = room(s.C);
        std::vector<float> made;
        Inputs<Matrix> of_normed(M, s.C), of_attended(M, s.H * s.D), of_hidden(M, s.F);
        auto take_in = [&](const void* weight) {
            for (i64 m = 0; m < M; ++m)
                normalise(x + m * s.C, static_cast<const T*>(weight), normed.data() + m * s.C, s.C, eps);
            of_normed.fill(normed.data(), M, s.C, 0, 1);
        };
        for (i64 l = 0; l < s.count; ++l) {
            const Layer& layer = s.layers[l];
            take_in(layer.attention_norm);
            const Map<T> maps[] = {map_of(layer.q, q.data()), map_of(layer.k, k.data()),
                                   map_of(layer.v, v.data())};
            map_rows<Matrix>(maps, 3, of_normed.of.data(), M, s.C, thread, threads, made);
#pragma omp barrier
            attention(layer, s.held[l], thread, threads);
            of_attended.fill(attended.data(), M, s.H * s.D, 0, 1);
            add(layer.o, of_attended, s.H * s.D, thread, threads, made);
            take_in(layer.mlp_norm);
            const Share mine(s.F, thread, threads);
            if (mine.from < mine.to)
                gate_rows(matrix(map_of<T>(layer.gate, nullptr), s.C, static_cast<Matrix*>(nullptr)),
                          matrix(map_of<T>(layer.up, nullptr), s.C, static_cast<Matrix*>(nullptr)),
                          of_normed.of.data(), M, mine.from, mine.to, hidden.data(), s.F, made);
#pragma omp barrier
            of_hidden.fill(hidden.data(), M, s.F, 0, 1);
            add(layer.down, of_hidden, s.F, thread, threads, made);
        }
    }
};

template <class Matrix, class T>
void stack(const Stack& s, float eps, float scale) {
    Step<Matrix, T> step{s, eps, scale};
    const i64 threads = omp_get_max_threads();
    // More parts than `parts_of` ever asks for.
    step.parts.assign(size_t(std::max(threads, 2 * (threads + step.units()) * s.T)), Partial(s.H / s.K, s.D));
#pragma omp parallel if (s.C * s.F * 3 >= SMALL)
    step.run(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

#define QUINTET_STACK(name, Matrix, T)                                                       \
    extern "C" void quintet_stack_##name(const Stack* stack_, float eps, float scale) {      \
        stack<Matrix, T>(*stack_, eps, scale);                                               \
    }
QUINTET_STACK(bf16, Plain<bf16>, bf16)
QUINTET_STACK(f32, Plain<float>, float)
QUINTET_STACK(int8_bf16, Int8, bf16)
QUINTET_STACK(int8_f32, Int8, float)
QUINTET_STACK(int4_bf16, Int4, bf16)
QUINTET_STACK(int4_f32, Int4, float)
