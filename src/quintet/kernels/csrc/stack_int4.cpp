// Layers whose matrices are in int4; a file of its own, so that compilers can share the work.
#include "stack.h"

using namespace quintet;

QUINTET_STACK(int4_bf16, Int4, bf16)
QUINTET_STACK(int4_f32, Int4, float)
