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

namespace quintet {

// As `quintet.kernels.parts` numbers them.
enum Kind : i64 { ATTENTION, MLP, MIXER, SHARED_MLP, EXPERTS, LATENT, FINAL_NORM };

// What a part holds, and what it keeps between steps.
struct Part {
    i64 kind;
    Span<const void> fields, held;
};

// Call `fn` with a null pointer of a kind's class; false where there is no such kind.
template <class Matrix, class T, class Fn>
bool with_kind(i64 kind, Fn&& fn) {
    switch (kind) {
        case ATTENTION: return fn(static_cast<AttentionPart<Matrix, T>*>(nullptr));
        case MLP: return fn(static_cast<MLPPart<Matrix, T>*>(nullptr));
        case MIXER: return fn(static_cast<MixerPart<Matrix, T>*>(nullptr));
        case SHARED_MLP: return fn(static_cast<SharedMLPPart<Matrix, T>*>(nullptr));
        case EXPERTS: return fn(static_cast<ExpertsPart<Matrix, T>*>(nullptr));
        case LATENT:
            if constexpr (std::is_same_v<T, bf16>) return fn(static_cast<LatentPart<Matrix>*>(nullptr));
            return false;
        case FINAL_NORM: return fn(static_cast<FinalNormPart<Matrix, T>*>(nullptr));
    }
    return false;
}

template <class P>
bool fits(P*, const Part& part, const Tokens& tokens) {
    using Held = typename P::Held;
    i64 kept = 0;
    if constexpr (!std::is_void_v<Held>) kept = sizeof(Held);
    return part.fields.bytes == i64(sizeof(typename P::Fields)) && part.held.bytes == kept &&
           P::fits(*static_cast<const typename P::Fields*>(part.fields.p),
                   static_cast<const Held*>(part.held.p), tokens);
}

template <class Matrix, class T>
struct Stack {
    i64 M, C, rows, sequences, angles, D, work, count;
    Span<T> x;                // (M, C), in and out
    Span<const T> embeds;     // the same
    Span<const T> cos, sin;   // (angles, D), of all tokens or of those of each sequence
    Span<const Sequence> of;  // whose tokens they are, one sequence behind the other
    // Two tables, as the second changes with the cache: kind and fields of each part and whether what
    // it makes adds up over processes, and what it keeps.
    struct Row {
        i64 kind;
        Span<const void> fields;
        i64 summed;
    };
    Span<const Row> parts;
    Span<const Span<const void>> held;
    SharedBuffer shared_buffer;  // of zeros where nothing adds up

    Part part(i64 i) const { return {parts[i].kind, parts[i].fields, held[i]}; }
    Tokens tokens() const {
        return {x.p, embeds.p, nullptr, cos.p, sin.p, angles, D, M, C, rows, {of.p, sequences}};
    }

    i64 size() const { return sizeof(Stack); }
    bool fits() const {
        if (M <= 0 || C <= 0 || rows <= 0 || sequences <= 0 || angles <= 0 || D < 0 || M % angles) return false;
        if (!x.holds(M * C) || !embeds.holds(M * C) || !cos.holds(angles * D) || !sin.holds(angles * D)) return false;
        if (!of.holds(sequences) || !parts.holds(count) || !held.holds(count)) return false;
        const Sequences all{of.p, sequences};
        if (!all.fits(rows, M)) return false;
        // Angles that sequences share are for tokens that stand alike in all of them.
        if (angles != M && !std::all_of(all.begin(), all.end(), [this](const Sequence& s) { return s.length == angles; }))
            return false;
        for (i64 i = 0; i < count; ++i) {
            const auto of_kind = [&](auto* kind) { return quintet::fits(kind, part(i), tokens()); };
            if (!with_kind<Matrix, T>(parts[i].kind, of_kind)) return false;
            if (parts[i].summed && !shared_buffer.fits()) return false;
        }
        return true;
    }
};

// Call `fn` with a part that takes what threads share from `room`.
template <class Matrix, class T, class Fn>
void with_part(const Part& given, const Tokens& tokens, i64 threads, Room& room, Fn&& fn) {
    with_kind<Matrix, T>(given.kind, [&](auto* kind) {
        using P = std::remove_pointer_t<decltype(kind)>;
        P part(*static_cast<const typename P::Fields*>(given.fields.p),
               static_cast<const typename P::Held*>(given.held.p), tokens, threads, room);
        fn(part);
        return true;
    });
}

template <class Matrix, class T>
void stack(const Stack<Matrix, T>& s) {
    const i64 most = omp_get_max_threads();
    Tokens tokens = s.tokens();
    size_t bytes = 0;
    for (i64 i = 0; i < s.count; ++i) {
        Room room(nullptr);
        with_part<Matrix, T>(s.part(i), tokens, most, room, [](auto&) {});
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
            me.shared_buffer = s.parts[i].summed ? &s.shared_buffer : nullptr;
            with_part<Matrix, T>(s.part(i), tokens, most, room, [&](auto& part) { part.run(me); });
        }
    }
}

}  // namespace quintet

#define QUINTET_STACK(name, Matrix, T)    \
    using Stack_##name = Stack<Matrix, T>; \
    QUINTET_ENTRY(stack_##name, Stack_##name, stack)
