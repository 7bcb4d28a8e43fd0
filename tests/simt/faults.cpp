// Faults: the harness's messages about a kernel that does something wrong.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "runtime.h"

namespace sn::simt {

const char* name_of(Op op) {
  switch (op) {
    case Op::kNothing:
      return "nothing";
    case Op::kShuffle:
      return "a shuffle";
    case Op::kVote:
      return "a vote";
    case Op::kMatch:
      return "match_any";
    case Op::kReduce:
      return "a reduction";
    case Op::kSyncWarp:
      return "sync_warp";
    case Op::kLoadMatrix:
      return "load_matrix_x4";
    case Op::kLoadMatrixTransposed:
      return "load_matrix_x4_transposed";
    case Op::kMma:
      return "mma_m16n8k16";
    case Op::kSyncBlock:
      return "sync_block";
    case Op::kSyncCluster:
      return "sync_cluster";
    case Op::kWaitCluster:
      return "wait_cluster";
    case Op::kWaitForPrimary:
      return "wait_for_primary";
  }
  return "?";
}

std::string text_of(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name != nullptr ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

// The demangled name of a function, from the symbol table of its file. Kernels are not exported, so dladdr alone does
// not know them.
std::string symbol_of(const void* address) {
  Dl_info info{};
  const bool found = dladdr(address, &info) != 0 && info.dli_fname != nullptr;
  std::ifstream file;
  if (found) file.open(info.dli_fname, std::ios::binary);
  if (!file.is_open()) file.open("/proc/self/exe", std::ios::binary);  // the program itself, or a static one
  const auto read_at = [&](std::uint64_t offset, void* out, std::size_t bytes) {
    file.seekg(static_cast<std::streamoff>(offset));
    return static_cast<bool>(file.read(static_cast<char*>(out), static_cast<std::streamsize>(bytes)));
  };
  ElfW(Ehdr) header{};
  if (!read_at(0, &header, sizeof(header)) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "?";
  std::vector<ElfW(Shdr)> sections(header.e_shnum);
  if (!read_at(header.e_shoff, sections.data(), sections.size() * sizeof(sections[0]))) return "?";
  const std::uint64_t base = header.e_type == ET_EXEC || !found ? 0 : reinterpret_cast<std::uint64_t>(info.dli_fbase);
  const std::uint64_t wanted = reinterpret_cast<std::uint64_t>(address) - base;
  for (const ElfW(Shdr) & section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    std::vector<ElfW(Sym)> symbols(section.sh_size / sizeof(ElfW(Sym)));
    if (!read_at(section.sh_offset, symbols.data(), symbols.size() * sizeof(symbols[0]))) return "?";
    for (const ElfW(Sym) & symbol : symbols) {
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_value != wanted) continue;
      std::string mangled(1024, '\0');
      file.clear();
      file.seekg(static_cast<std::streamoff>(sections[section.sh_link].sh_offset + symbol.st_name));
      file.read(mangled.data(), static_cast<std::streamsize>(mangled.size()));
      int status = 0;
      char* plain = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
      std::string name = status == 0 ? plain : mangled.c_str();
      std::free(plain);
      return name;
    }
  }
  return "?";
}

std::string kernel_text() {
  return symbol_of(grid.kernel) + ", launched at " + text_of(site_of(grid.where));
}

std::string hex(std::uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

namespace {

// What each lane of a warp does, for a fault that concerns all of them.
std::string state_of(const Warp& warp) {
  std::string text;
  std::uint32_t told = 0;
  for (int l = 0; l < kLanes; ++l) {
    if ((told >> l & 1u) != 0) continue;
    const Lane& one = warp.lanes[l];
    std::uint32_t same = 0;
    for (int m = l; m < kLanes; ++m) {
      const Lane& other = warp.lanes[m];
      if (other.returned == one.returned && other.waits_for == one.waits_for &&
          (one.waits_for == Op::kNothing || other.site.line == one.site.line)) {
        same |= 1u << m;
      }
    }
    told |= same;
    text += text.empty() ? "" : "; ";
    text += "lanes " + hex(same);
    if (one.returned) {
      text += " have returned";
    } else if (one.waits_for == Op::kNothing) {
      text += " run";
    } else {
      text += std::string(" wait at ") + name_of(one.waits_for) + " (" + text_of(one.site) + ")";
    }
  }
  return text;
}

}  // namespace

std::string stuck_text() {
  std::string text = kernel_text() + ": nothing can go on:";
  int told = 0;
  for (const Cluster* cluster : rt.resident) {
    for (const Block* block : cluster->blocks) {
      for (int w = 0; w < block->warp_count; ++w) {
        const Warp& warp = block->warps[static_cast<std::size_t>(w)];
        if (warp.returned == kAllLanes || ++told > 8) continue;
        text += "\n  block " + std::to_string(block->id) + ", warp " + std::to_string(w) + ": " + state_of(warp);
      }
    }
  }
  return text;
}

void report(const std::string& what, Site site) {
  const Lane& lane = *current;
  throw Fault{kernel_text() + ": block " + std::to_string(lane.block->id) + ", thread " + std::to_string(lane.thread) +
              ", " + text_of(site) + ": " + what};
}

}  // namespace sn::simt
