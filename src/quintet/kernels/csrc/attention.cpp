// Attention with keys and values as they are.
#include "attention.h"

extern "C" void quintet_attention_bf16(const Attention* a, float scale) { attend(*a, scale); }
