// Sums and joins of what processes of one machine have.
#include "shared_buffer.h"

using namespace quintet;

namespace {

enum Kind : i64 { BF16, F32, F64, I64, I32 };

i64 size_of(i64 kind) {
    switch (kind) {
        case BF16: return 2;
        case F32: case I32: return 4;
        case F64: case I64: return 8;
    }
    return 0;
}

struct Sum {
    SharedBuffer shared_buffer;
    i64 kind, n;
    Span<char> x;  // n numbers, in and out

    i64 size() const { return sizeof(Sum); }
    bool fits() const { return shared_buffer.fits() && size_of(kind) && n >= 0 && x.holds(n * size_of(kind)); }
};

void sum(const Sum& c) {
    switch (c.kind) {
        case BF16: c.shared_buffer.sum(reinterpret_cast<bf16*>(c.x.p), c.n); break;
        case F32: c.shared_buffer.sum(reinterpret_cast<float*>(c.x.p), c.n); break;
        case F64: c.shared_buffer.sum(reinterpret_cast<double*>(c.x.p), c.n); break;
        case I64: c.shared_buffer.sum(reinterpret_cast<int64_t*>(c.x.p), c.n); break;
        case I32: c.shared_buffer.sum(reinterpret_cast<int32_t*>(c.x.p), c.n); break;
    }
}

struct Gather {
    SharedBuffer shared_buffer;
    i64 n;
    Span<const char> x;  // n bytes
    Span<char> y;        // (count, n)

    i64 size() const { return sizeof(Gather); }
    bool fits() const { return shared_buffer.fits() && n >= 0 && x.holds(n) && y.holds(shared_buffer.count * n); }
};

void gather(const Gather& c) { c.shared_buffer.gather(c.x, c.y, c.n); }

}  // namespace

QUINTET_ENTRY(shared_buffer_sum, Sum, sum)
QUINTET_ENTRY(shared_buffer_gather, Gather, gather)
