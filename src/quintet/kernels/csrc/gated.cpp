// Gated MLPs of few tokens.
#include "gated_call.h"

using namespace quintet;

QUINTET_GATED(bf16, Plain<bf16>, bf16)
QUINTET_GATED(f32, Plain<float>, float)
QUINTET_GATED(int8_bf16, Int8, bf16)
QUINTET_GATED(int8_f32, Int8, float)
QUINTET_GATED(int4_bf16, Int4, bf16)
QUINTET_GATED(int4_f32, Int4, float)
QUINTET_GATED(groups_bf16, Groups, bf16)
QUINTET_GATED(groups_f32, Groups, float)
