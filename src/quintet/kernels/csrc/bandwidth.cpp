// Reading memory and nothing else, as fast as all threads together can: what streaming kernels are
// compared with. The sums keep the compiler from leaving the reads out.
#include <omp.h>

#include "span.h"

using namespace quintet;

namespace {

struct Call {
    i64 count;
    Span<const float> x;
    Span<float> total;

    i64 size() const { return sizeof(Call); }
    bool fits() const { return x.holds(count) && total.holds(1); }
};

void read(const Call& c) {
    const float* x = c.x;
    const i64 count = c.count;
    constexpr i64 STEP = 8 * LANES, LINE = 16;
    double all_threads = 0;
#pragma omp parallel reduction(+ : all_threads)
    {
        const i64 steps = count / STEP, threads = omp_get_num_threads(), me = omp_get_thread_num();
        const float* p = x + steps * me / threads * STEP;
        const float* end = x + steps * (me + 1) / threads * STEP;
        F sums[8];
        for (F& each : sums) each = zero();
        for (; p < end; p += STEP) {
            for (i64 line = 0; line < STEP; line += LINE) prefetch<_MM_HINT_T0>(p + line, 8192);
            for (i64 k = 0; k < 8; ++k) sums[k] = add(sums[k], load(p + k * LANES));
        }
        for (const F& each : sums) all_threads += sum(each);
        if (me == 0)
            for (const float* q = x + steps * STEP; q < x + count; ++q) all_threads += *q;
    }
    *c.total = float(all_threads);
}

}  // namespace

QUINTET_ENTRY(read_f32, Call, read)
