// Layers whose matrices are as they are; a file of its own, so that compilers can share the work.
#include "stack.h"

using namespace quintet;

QUINTET_STACK(bf16, Plain<bf16>, bf16)
QUINTET_STACK(f32, Plain<float>, float)
