// All that multiplies matrices in groups, in one file: its loops are compiled once.
#include "gated_call.h"
#include "linear_call.h"
#include "stack.h"

QUINTET_LINEAR(groups_bf16, Groups, bf16)
QUINTET_LINEAR(groups_f32, Groups, float)
QUINTET_GATED(groups_bf16, Groups, bf16)
QUINTET_GATED(groups_f32, Groups, float)
QUINTET_STACK(groups_bf16, Groups, bf16)
QUINTET_STACK(groups_f32, Groups, float)
