// What GCC calls where code compiled with -fsanitize=undefined would do something that C++ leaves undefined:
// a misaligned access, a signed overflow, an index beyond an array, ... UBSan's own library would print the
// line; these end the launch with an error that names kernel, block and thread as well. In host code, where
// there is no launch to end, they end the process.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "engine.h"
#include "symbols.h"

namespace wsss::emulation {
namespace {

// As GCC lays them out. Only the parts that a report reads have names.
struct Location {
    const char* file;
    uint32_t line, column;
};
struct Type {
    enum Kind : uint16_t { integer = 0, real = 1 };
    uint16_t kind;
    uint16_t info;  // integers: the lowest bit is 1 for signed, the rest log2 of the bits; floats: the bits
    char name[1];   // in quotes, and as long as it is
};
struct OfType {
    Location location;
    const Type* type;
};
struct OfTwoTypes {
    Location location;
    const Type* first;
    const Type* second;
};
struct OfPointer {
    Location location;
    const Type* type;
    unsigned char alignment_log2;
    unsigned char kind;
};
using Value = uintptr_t;  // the number itself, or its address where it is wider

std::string text(const Type& type, Value value) {
    if (type.kind == Type::integer) {
        const unsigned bits = 1u << (type.info >> 1);
        if (bits > 64) return "a number";
        if ((type.info & 1) == 0) return std::to_string(value);
        return std::to_string(static_cast<int64_t>(value << (64 - bits)) >> (64 - bits));
    }
    if (type.kind == Type::real && type.info <= 64) {
        float narrow;
        double wide;
        std::memcpy(&narrow, &value, sizeof narrow);
        std::memcpy(&wide, &value, sizeof wide);
        return std::to_string(type.info == 32 ? static_cast<double>(narrow) : wide);
    }
    return "a number";
}

std::string name(const Type& type) {
    const std::string quoted = type.name;
    return quoted.substr(1, quoted.size() - 2);
}

[[noreturn]] void report(const std::string& what, const void* code) {
    if (running.is_caller()) fail(what, source_line(code));
    std::fprintf(stderr, "%s at %s\n", what.c_str(), source_line(code).c_str());
    std::abort();
}

}  // namespace
}  // namespace wsss::emulation

using namespace wsss::emulation;

#define WSSS_UNDEFINED(name, ...) extern "C" [[noreturn]] void __ubsan_handle_##name(__VA_ARGS__)
#define WSSS_REPORT(what) report(what, __builtin_return_address(0))

WSSS_UNDEFINED(type_mismatch_v1_abort, const OfPointer* data, Value address) {
    const Value alignment = Value{1} << data->alignment_log2;
    const std::string type = name(*data->type);
    if (address == 0) WSSS_REPORT("access to a " + type + " through a null pointer");
    if (address % alignment == 0) WSSS_REPORT("access to a " + type + " beyond the end of the variable");
    WSSS_REPORT("misaligned access: a " + type + " needs an address that is a multiple of " +
                std::to_string(alignment) + ", this one is " + std::to_string(address % alignment) +
                " bytes beyond one,");
}

#define WSSS_OVERFLOW(name_, sign)                                                             \
    WSSS_UNDEFINED(name_##_overflow_abort, const OfType* data, Value a, Value b) {             \
        WSSS_REPORT("signed overflow: " + text(*data->type, a) + sign + text(*data->type, b) + \
                    " does not fit " + name(*data->type));                                     \
    }
WSSS_OVERFLOW(add, " + ")
WSSS_OVERFLOW(sub, " - ")
WSSS_OVERFLOW(mul, " * ")

WSSS_UNDEFINED(negate_overflow_abort, const OfType* data, Value value) {
    WSSS_REPORT("signed overflow: -(" + text(*data->type, value) + ") does not fit " + name(*data->type));
}
WSSS_UNDEFINED(divrem_overflow_abort, const OfType* data, Value a, Value b) {
    WSSS_REPORT("division of " + text(*data->type, a) + " by " + text(*data->type, b));
}
WSSS_UNDEFINED(shift_out_of_bounds_abort, const OfTwoTypes* data, Value value, Value bits) {
    WSSS_REPORT("shift of " + text(*data->first, value) + " (" + name(*data->first) + ") by " +
                text(*data->second, bits));
}
WSSS_UNDEFINED(out_of_bounds_abort, const OfTwoTypes* data, Value index) {
    WSSS_REPORT("index " + text(*data->second, index) + " is outside " + name(*data->first));
}
WSSS_UNDEFINED(float_cast_overflow_abort, const OfTwoTypes* data, Value value) {
    WSSS_REPORT("conversion of " + text(*data->first, value) + ", which is outside the range of " +
                name(*data->second));
}
WSSS_UNDEFINED(load_invalid_value_abort, const OfType* data, Value value) {
    WSSS_REPORT(text(*data->type, value) + " is read as " + name(*data->type));
}
WSSS_UNDEFINED(vla_bound_not_positive_abort, const OfType* data, Value size) {
    WSSS_REPORT("array of " + text(*data->type, size) + " elements");
}
WSSS_UNDEFINED(nonnull_arg_abort, const Location*) { WSSS_REPORT("null pointer as an argument"); }
WSSS_UNDEFINED(nonnull_return_v1_abort, const Location*, const Location*) {
    WSSS_REPORT("null pointer as a result");
}
WSSS_UNDEFINED(invalid_builtin_abort, const Location*) { WSSS_REPORT("a builtin of zero"); }
WSSS_UNDEFINED(missing_return, const Location*) { WSSS_REPORT("end of a function that returns a value"); }
WSSS_UNDEFINED(builtin_unreachable, const Location*) { WSSS_REPORT("__builtin_unreachable is reached"); }
