// Causal attention that learns, over texts behind each other.
#include "causal.h"

#include <omp.h>

using namespace quintet;

namespace {

template <class T>
struct Given {
    i64 M, count;
    Heads z;
    double scale;
    Span<const i64> lengths;  // (count), that sum to M
    Span<const T> q, k, v;    // (M, H, D), (M, K, D), (M, K, V)

    bool fits() const {
        if (M <= 0 || count <= 0 || !z.fits() || !lengths.holds(count)) return false;
        i64 left = M;
        for (i64 i = 0; i < count; ++i) {
            if (lengths[i] <= 0 || lengths[i] > left) return false;
            left -= lengths[i];
        }
        return left == 0 && q.holds(M * z.H * z.D) && k.holds(M * z.K * z.D) && v.holds(M * z.K * z.V);
    }
    std::vector<Sequence> texts() const {
        std::vector<Sequence> all;
        for (i64 i = 0, first = 0; i < count; first += lengths[i++]) all.push_back({i, 0, lengths[i], first});
        return all;
    }
    Causal<T> attention(const std::vector<Sequence>& texts) const {
        return {z, float(scale), {texts.data(), count}, q, k, v};
    }
};

template <class T>
struct AttendCall {
    Given<T> given;
    Span<T> out;       // (M, H, V)
    Span<float> logs;  // (M, H)

    i64 size() const { return sizeof(AttendCall); }
    bool fits() const {
        const i64 rows = given.M * given.z.H;
        return given.fits() && out.holds(rows * given.z.V) && logs.holds(rows);
    }
};

template <class T>
void attend(const AttendCall<T>& c) {
    const auto texts = c.given.texts();
    const auto attention = c.given.attention(texts);
    const i64 H = c.given.z.H;
#pragma omp parallel
    {
        typename Causal<T>::Room room;
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < c.given.count * H; ++i) attention.forward(texts[i / H], i % H, c.out, c.logs, room);
    }
}

template <class T>
struct BackCall {
    Given<T> given;
    Span<const T> out, grad;  // (M, H, V)
    Span<const float> logs;   // (M, H)
    Span<T> for_q, for_k, for_v;

    i64 size() const { return sizeof(BackCall); }
    bool fits() const {
        if (!given.fits()) return false;
        const Heads& z = given.z;
        const i64 rows = given.M * z.H, pairs = given.M * z.K;
        return out.holds(rows * z.V) && grad.holds(rows * z.V) && logs.holds(rows) && for_q.holds(rows * z.D) &&
               for_k.holds(pairs * z.D) && for_v.holds(pairs * z.V);
    }
};

// The sum over the query heads that share one of keys, (M, K·R, D) -> (M, K, D).
template <class T>
void share(const float* x, i64 rows, i64 R, i64 D, T* to) {
#pragma omp parallel for schedule(static)
    for (i64 r = 0; r < rows; ++r)
        for (i64 i = 0; i < D; i += LANES) {
            F all = load(x + r * R * D + i);
            for (i64 h = 1; h < R; ++h) all = add(all, load(x + (r * R + h) * D + i));
            store(to + r * D + i, all);
        }
}

template <class T>
void back(const BackCall<T>& c) {
    const auto texts = c.given.texts();
    const auto attention = c.given.attention(texts);
    const Heads& z = c.given.z;
    const i64 H = z.H, M = c.given.M;
    const std::unique_ptr<float[]> for_k(new float[size_t(M * H * z.D)]), for_v(new float[size_t(M * H * z.V)]);
#pragma omp parallel
    {
        typename Causal<T>::Room room;
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < c.given.count * H; ++i)
            attention.backward(texts[i / H], i % H, c.out, c.grad, c.logs, c.for_q, for_k.get(), for_v.get(), room);
    }
    share(for_k.get(), M * z.K, H / z.K, z.D, c.for_k.p);
    share(for_v.get(), M * z.K, H / z.K, z.V, c.for_v.p);
}

}  // namespace

QUINTET_ENTRY(causal_f32, AttendCall<float>, attend)
QUINTET_ENTRY(causal_bf16, AttendCall<bf16>, attend)
QUINTET_ENTRY(causal_back_f32, BackCall<float>, back)
QUINTET_ENTRY(causal_back_bf16, BackCall<bf16>, back)
