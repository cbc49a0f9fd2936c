// Decoder layers for few tokens, in one call: what waiting for the next call and the next team of
// threads takes is most of what a step takes beside its weights.
//
// A layer is a few parts x += part(norm(x)), each in a header of its own (parts/). Results are rounded
// where the layer's own modules round them.
#pragma once
#include <omp.h>

#include "parts/attention.h"
#include "parts/experts.h"
#include "parts/final_norm.h"
#include "parts/latent.h"
#include "parts/mixer.h"
#include "parts/mlp.h"
#include "parts/shared_mlp.h"

namespace {

// As `quintet.kernels.parts` numbers them.
enum Kind : i64 { ATTENTION, MLP, MIXER, SHARED_MLP, EXPERTS, LATENT, FINAL_NORM };

struct Part {
    i64 kind;
    const void* fields;
};

struct Stack {
    Tokens tokens;
    const Part* parts;
    const void* const* held;  // what each part keeps between steps, or null
    i64 count, work;
};

// Call `fn` with a part that takes what threads share from `room`.
template <class Matrix, class T, class Fn>
void with_part(const Stack& s, const Tokens& tokens, i64 i, i64 threads, Room& room, Fn&& fn) {
    const auto as = [&](auto* kind) {
        using P = std::remove_pointer_t<decltype(kind)>;
        P part(*static_cast<const typename P::Fields*>(s.parts[i].fields),
               static_cast<const typename P::Held*>(s.held[i]), tokens, threads, room);
        fn(part);
    };
    switch (s.parts[i].kind) {
        case ATTENTION: return as(static_cast<AttentionPart<Matrix, T>*>(nullptr));
        case MLP: return as(static_cast<MLPPart<Matrix, T>*>(nullptr));
        case MIXER: return as(static_cast<MixerPart<Matrix, T>*>(nullptr));
        case SHARED_MLP: return as(static_cast<SharedMLPPart<Matrix, T>*>(nullptr));
        case EXPERTS: return as(static_cast<ExpertsPart<Matrix, T>*>(nullptr));
        case LATENT:
            if constexpr (std::is_same_v<T, bf16>) as(static_cast<LatentPart<Matrix>*>(nullptr));
            return;
        case FINAL_NORM: return as(static_cast<FinalNormPart<Matrix, T>*>(nullptr));
    }
}

template <class Matrix, class T>
void stack(const Stack& s) {
    const i64 most = omp_get_max_threads();
    Tokens tokens = s.tokens;
    size_t bytes = 0;
    for (i64 i = 0; i < s.count; ++i) {
        Room room(nullptr);
        with_part<Matrix, T>(s, tokens, i, most, room, [](auto&) {});
        bytes = std::max(bytes, room.used());
    }
    std::vector<T> beside(size_t(tokens.all() * tokens.C));
    tokens.beside = beside.data();
    std::vector<char> memory(bytes + 64);
    char* aligned = memory.data() + size_t(-reinterpret_cast<uintptr_t>(memory.data()) % 64);
#pragma omp parallel if (s.work >= SMALL)
    {
        Member<Matrix, T> me{tokens, omp_get_thread_num(), omp_get_num_threads(), {}};
        for (i64 i = 0; i < s.count; ++i) {
            Room room(aligned);
            with_part<Matrix, T>(s, tokens, i, most, room, [&](auto& part) { part.run(me); });
        }
    }
}

}  // namespace

#define QUINTET_STACK(name, Matrix, T) \
    extern "C" void quintet_stack_##name(const Stack* call) { stack<Matrix, T>(*call); }
