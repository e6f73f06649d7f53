#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace wsss::emulation {
namespace {

// Calls visit(symbol, name, address) for each symbol in the table that the linker leaves beside the dynamic
// one: it alone has the local symbols, which kernels and shared variables in unnamed namespaces are.
template <class Visit>
void for_each_symbol(Visit&& visit) {
    Dl_info self;
    if (dladdr(reinterpret_cast<const void*>(&function_name), &self) == 0) {
        throw std::runtime_error("emulation: cannot find the file that it was loaded from");
    }
    std::ifstream file(self.dli_fname, std::ios::binary | std::ios::ate);
    std::vector<char> image(file ? static_cast<size_t>(file.tellg()) : 0);
    if (image.size() < sizeof(Elf64_Ehdr) || !file.seekg(0).read(image.data(), image.size())) {
        throw std::runtime_error(std::string("emulation: cannot read ") + self.dli_fname);
    }
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + header->e_shoff);
    char* base = header->e_type == ET_DYN ? static_cast<char*>(self.dli_fbase) : nullptr;
    for (int i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const auto* symbols = reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
        const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
        for (size_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s) {
            visit(symbols[s], names + symbols[s].st_name, base + symbols[s].st_value);
        }
        return;
    }
    throw std::runtime_error(std::string("emulation: ") + self.dli_fname +
                             " was stripped of its symbol table");
}

}  // namespace

std::string function_name(const void* function) {
    std::string result = "unknown";
    for_each_symbol([&](const Elf64_Sym& symbol, const char* name, const void* address) {
        if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || address != function) return;
        char* readable = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
        result = readable != nullptr ? readable : name;
        std::free(readable);
    });
    return result;
}

const std::vector<Memory>& static_shared_memory() {
    static const std::vector<Memory> found = [] {
        std::vector<Memory> variables;
        for_each_symbol([&](const Elf64_Sym& symbol, const char* name, char* address) {
            if (ELF64_ST_TYPE(symbol.st_info) == STT_OBJECT &&
                std::strstr(name, "B11cuda_shared") != nullptr) {
                variables.push_back({address, symbol.st_size});
            }
        });
        return variables;
    }();
    return found;
}

}  // namespace wsss::emulation
