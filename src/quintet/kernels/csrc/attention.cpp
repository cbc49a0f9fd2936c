// Attention with keys and values as they are.
#include "attention.h"

extern "C" void quintet_attention_bf16(const Attention* a, float scale) {
    const Division division(*a, omp_get_max_threads());
    float* memory = memory_of(division);
#pragma omp parallel
    attend(*a, scale, division, memory);
}
