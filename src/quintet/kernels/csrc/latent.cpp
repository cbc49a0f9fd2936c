// Latent attention by itself.
#include "latent.h"

extern "C" void quintet_latent_bf16(const Latent* latent, float scale) {
    const Division division(latent->attention(), omp_get_max_threads());
    float* memory = memory_of(division);
#pragma omp parallel
    attend(*latent, scale, division, memory);
}
