// Linear maps of few vectors.
#include "linear_call.h"

using namespace quintet;

QUINTET_LINEAR(bf16, Plain<bf16>, bf16)
QUINTET_LINEAR(f32, Plain<float>, float)
QUINTET_LINEAR(int8_bf16, Int8, bf16)
QUINTET_LINEAR(int8_f32, Int8, float)
QUINTET_LINEAR(int4_bf16, Int4, bf16)
QUINTET_LINEAR(int4_f32, Int4, float)
QUINTET_LINEAR(groups_bf16, Groups, bf16)
QUINTET_LINEAR(groups_f32, Groups, float)
