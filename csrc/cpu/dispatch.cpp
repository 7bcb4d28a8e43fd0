// Chooses the instruction set: the best that the machine and its operating system support, unless one is set.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu.h"
#include "kernels.h"

namespace sn::cpu {
namespace {

struct Level {
  const Kernels* kernels;
  bool usable;
};

// Weakest first. __builtin_cpu_supports also checks that the operating system saves the registers.
std::vector<Level> levels() {
  std::vector<Level> all = {{&generic::kTable, true}};
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(SN_CPU_HAS_AVX2)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  all.push_back({&avx2::kTable, has_avx2});
#endif
#if defined(SN_CPU_HAS_AVX512)
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({&avx512::kTable, has_avx512});
#endif
#if defined(SN_CPU_HAS_AVX512_VNNI)
  all.push_back({&avx512_vnni::kTable, has_avx512 && __builtin_cpu_supports("avx512vnni")});
#endif
#endif
  return all;
}

// `what` asks for the name.
const Kernels* find(const std::string& name, const std::string& what) {
  std::string allowed;
  for (const Level& level : levels()) {
    if (!level.usable) continue;
    if (name == level.kernels->name) return level.kernels;
    allowed += std::string(allowed.empty() ? "" : ", ") + level.kernels->name;
  }
  throw std::invalid_argument(what + ": expected one of " + allowed + ", got '" + name + "'");
}

const Kernels* at_load() {
  constexpr const char* kVariable = "SN_OPS_CPU_CAPABILITY";
  if (const char* wanted = std::getenv(kVariable)) {
    if (*wanted != '\0') return find(wanted, kVariable);
  }
  const Kernels* best = nullptr;
  for (const Level& level : levels()) {
    if (level.usable) best = level.kernels;
  }
  return best;
}

// Chosen at the first use, not at load: a wrong SN_OPS_CPU_CAPABILITY is then an error that a program can catch.
std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = at_load();
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

std::vector<std::string> compiled_capabilities() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.emplace_back(level.kernels->name);
  return names;
}

std::vector<std::string> usable_capabilities() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.usable) names.emplace_back(level.kernels->name);
  }
  return names;
}

std::string capability() {
  return active_kernels().name;
}

void set_capability(const std::string& name) {
  active.store(find(name, "CPU capability"), std::memory_order_release);
}

}  // namespace sn::cpu
