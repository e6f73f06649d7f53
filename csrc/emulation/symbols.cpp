#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

// Where the NOPs begin that __launch_bounds__ puts before each kernel (see cuda.h).
extern "C" {
[[gnu::weak]] extern const char* const __start___patchable_function_entries[];
[[gnu::weak]] extern const char* const __stop___patchable_function_entries[];
}

namespace wsss::emulation {
namespace {

#if defined(__aarch64__)
constexpr size_t nop_bytes = 4;
#else
constexpr size_t nop_bytes = 1;
#endif

Dl_info find_library() {
    Dl_info library;
    if (dladdr(reinterpret_cast<const void*>(&find_library), &library) == 0) {
        throw std::runtime_error("emulation: cannot find the file that it was loaded from");
    }
    return library;
}

struct Variable {
    std::string name;  // mangled
    Memory memory;
};

struct Symbols {
    std::map<const char*, std::string> functions;  // mangled names by address
    std::vector<Variable> shared;
};

// From the table that the linker leaves beside the dynamic one: it alone has the local symbols, which kernels
// and shared variables in unnamed namespaces are.
Symbols read_symbols() {
    const Dl_info library = find_library();
    std::ifstream file(library.dli_fname, std::ios::binary | std::ios::ate);
    std::vector<char> image(file ? static_cast<size_t>(file.tellg()) : 0);
    if (image.size() < sizeof(Elf64_Ehdr) || !file.seekg(0).read(image.data(), image.size())) {
        throw std::runtime_error(std::string("emulation: cannot read ") + library.dli_fname);
    }
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + header->e_shoff);
    const auto table = std::find_if(sections, sections + header->e_shnum,
                                    [](const Elf64_Shdr& section) { return section.sh_type == SHT_SYMTAB; });
    if (table == sections + header->e_shnum) {
        throw std::runtime_error(std::string("emulation: ") + library.dli_fname +
                                 " was stripped of its symbol table");
    }
    char* base = header->e_type == ET_DYN ? static_cast<char*>(library.dli_fbase) : nullptr;
    const auto* entries = reinterpret_cast<const Elf64_Sym*>(image.data() + table->sh_offset);
    const char* names = image.data() + sections[table->sh_link].sh_offset;
    Symbols symbols;
    for (size_t i = 0; i < table->sh_size / sizeof(Elf64_Sym); ++i) {
        const char* name = names + entries[i].st_name;
        char* address = base + entries[i].st_value;
        const int type = ELF64_ST_TYPE(entries[i].st_info);
        if (type == STT_FUNC && entries[i].st_shndx != SHN_UNDEF) symbols.functions.emplace(address, name);
        if (type == STT_OBJECT && std::strstr(name, "B11cuda_shared") != nullptr) {
            symbols.shared.push_back({name, {address, entries[i].st_size}});
        }
    }
    return symbols;
}

const Symbols& symbols() {
    static const Symbols read = read_symbols();
    return read;
}

Kernel read_kernel(const char* address) {
    Kernel kernel;
    const auto function = symbols().functions.find(address);
    if (function == symbols().functions.end()) return kernel;
    const std::string& name = function->second;
    char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
    kernel.name = readable != nullptr ? readable : name;
    std::free(readable);

    // The NOPs belong to the first function after them.
    for (const char* const* nops = __start___patchable_function_entries;
         nops != __stop___patchable_function_entries; ++nops) {
        if (symbols().functions.lower_bound(*nops) == function) {
            kernel.most_threads = static_cast<unsigned>((address - *nops) / nop_bytes);
        }
    }
    // A variable of function _Zf is called _ZZfE and then its own name.
    const std::string prefix = "_ZZ" + name.substr(2) + "E";
    for (const Variable& variable : symbols().shared) {
        if (variable.name.compare(0, prefix.size(), prefix) == 0) {
            kernel.shared_bytes += variable.memory.bytes;
        }
    }
    return kernel;
}

std::string output_of(const std::string& command) {
    std::string output;
    FILE* pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return output;
    char buffer[4096];
    while (const size_t got = std::fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, got);
    pclose(pipe);
    return output;
}

}  // namespace

const Kernel& describe(const void* kernel) {
    static std::unordered_map<const void*, Kernel> known;
    const auto found = known.find(kernel);
    if (found != known.end()) return found->second;
    return known.emplace(kernel, read_kernel(static_cast<const char*>(kernel))).first->second;
}

const std::vector<Memory>& static_shared_memory() {
    static const std::vector<Memory> found = [] {
        std::vector<Memory> memories;
        for (const Variable& variable : symbols().shared) memories.push_back(variable.memory);
        return memories;
    }();
    return found;
}

std::string source_line(const void* code) {
    const Dl_info library = find_library();
    const size_t offset = static_cast<const char*>(code) - 1 - static_cast<const char*>(library.dli_fbase);
    char address[32];
    std::snprintf(address, sizeof address, "0x%zx", offset);
    // One line for the innermost inlined function, and one for each that it was inlined into.
    std::istringstream frames(
        output_of(std::string("addr2line -i -e '") + library.dli_fname + "' " + address + " 2>/dev/null"));
    std::string line;
    while (std::getline(frames, line)) {
        line = line.substr(0, line.find(" (discriminator"));
        const std::string file = line.substr(0, line.rfind(':'));
        const bool of_emulation = file.find("/emulation/") != std::string::npos && file.back() == 'h';
        if (!of_emulation && file != "??") return line;
    }
    return std::string(library.dli_fname) + "+" + address;
}

}  // namespace wsss::emulation
