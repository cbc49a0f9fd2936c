// How the fields of the parts of a stack lie, for Python to compare with what it writes.
#include <string>

#include "stack.h"

using namespace quintet;

namespace {

using Matrix = Int8;

// The names of a list that the preprocessor made, one after the other.
class Names {
  public:
    explicit Names(const char* all) : all_(all) {}
    std::string next() {
        while (*all_ == ' ' || *all_ == ',') ++all_;
        const char* end = all_;
        while (*end && *end != ',') ++end;
        std::string name(all_, end);
        all_ = end;
        return name;
    }

  private:
    const char* all_;
};

void describe(const std::string& name, const i64&, std::string& to) { to += name + ":i "; }
void describe(const std::string& name, const double&, std::string& to) { to += name + ":d "; }
void describe(const std::string& name, const Source&, std::string& to) { to += name + ":i "; }
void describe(const std::string& name, const Scoring&, std::string& to) { to += name + ":i "; }
template <class T>
void describe(const std::string& name, const Span<T>&, std::string& to) { to += name + ":p " + name + ":b "; }
template <class S>
auto describe(const std::string& name, const S& s, std::string& to) -> decltype(s.fields(), void());
template <class S, size_t N>
void describe(const std::string& name, const S (&all)[N], std::string& to) {
    for (size_t i = 0; i < N; ++i) describe(name + "[" + std::to_string(i) + "]", all[i], to);
}

template <class... Types>
constexpr size_t size_of(std::tuple<Types...>*) { return (sizeof(std::remove_reference_t<Types>) + ... + 0); }

template <class S>
auto describe(const std::string& name, const S& s, std::string& to) -> decltype(s.fields(), void()) {
    static_assert(size_of(static_cast<decltype(s.fields())*>(nullptr)) == sizeof(S), "a field is not listed");
    Names names(S::names());
    const char* at = reinterpret_cast<const char*>(&s);
    std::apply(
        [&](const auto&... field) {
            const auto one = [&](const auto& value) {
                const std::string own = names.next();
                to += reinterpret_cast<const char*>(&value) == at ? "" : "out of order: ";
                at += sizeof(value);
                describe(name.empty() ? own : name + "." + own, value, to);
            };
            (one(field), ...);
        },
        s.fields());
}

template <class P>
void describe_part(i64 kind, std::string& to) {
    typename P::Fields fields{};
    to += std::to_string(kind) + " fields ";
    describe("", fields, to);
    to += "\n" + std::to_string(kind) + " held ";
    if constexpr (!std::is_void_v<typename P::Held>) {
        typename P::Held held{};
        describe("", held, to);
    }
    to += "\n";
}

std::string layout() {
    std::string to;
    for (i64 kind = ATTENTION; kind <= FINAL_NORM; ++kind)
        with_kind<Matrix, bf16>(kind, [&](auto* part) {
            describe_part<std::remove_pointer_t<decltype(part)>>(kind, to);
            return true;
        });
    return to;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* quintet_layout() {
    static const std::string made = layout();
    return made.c_str();
}
