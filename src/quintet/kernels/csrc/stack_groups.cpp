// Layers whose matrices are integers in groups; a file of its own, so that compilers can share the work.
#include "stack.h"

using namespace quintet;

QUINTET_STACK(groups_bf16, Groups, bf16)
QUINTET_STACK(groups_f32, Groups, float)
