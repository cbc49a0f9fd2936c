// Layers whose matrices are in int8; a file of its own, so that compilers can share the work.
#include "stack.h"

using namespace quintet;

QUINTET_STACK(int8_bf16, Int8, bf16)
QUINTET_STACK(int8_f32, Int8, float)
