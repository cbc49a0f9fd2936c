// Routers by themselves.
#include <omp.h>

#include "routing.h"

namespace {

// Products below which one thread does it all.
constexpr i64 FEW = 1 << 16;

template <class T>
void logits(const Logits<T>& of) {
#pragma omp parallel if (of.N * of.E * of.C >= FEW)
    {
        const Share mine(of.E, omp_get_thread_num(), omp_get_num_threads());
        of.run(mine.from, mine.to);
    }
}

template <class T>
void choose(const Rules& rules, const T* logits, i64 N, i64* indices, float* weights) {
    Router router(rules);
    for (i64 n = 0; n < N; ++n)
        router.choose(logits + n * rules.E, indices + n * rules.A, weights + n * rules.A);
}

}  // namespace

#define QUINTET_ROUTING(name, T)                                                                      \
    extern "C" void quintet_router_logits_##name(const Logits<T>* of) { logits(*of); }                \
    extern "C" void quintet_choose_##name(const Rules* rules, const T* logits, i64 N, i64* indices,   \
                                          float* weights) {                                           \
        choose(*rules, logits, N, indices, weights);                                                  \
    }
QUINTET_ROUTING(bf16, bf16)
QUINTET_ROUTING(f32, float)
