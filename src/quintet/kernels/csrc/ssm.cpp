// Mamba-2's mixer between its projections, by a team of its own.
#include <omp.h>

#include "ssm.h"

namespace {

template <class T>
void mix(const Mixer<T>& mixer) {
#pragma omp parallel
    mixer.run(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

extern "C" {
void quintet_mamba2_bf16(const Mixer<bf16>* mixer) { mix(*mixer); }
void quintet_mamba2_f32(const Mixer<float>* mixer) { mix(*mixer); }
}
