// The entry points of the CPU backend: a forward to a loss and a support graph, a backward from one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../sn_types.h"

namespace sn::cpu {

// Instruction sets the kernels are compiled for, weakest first. Results have the same bits at every level.
std::vector<std::string> compiled_capabilities();
std::vector<std::string> usable_capabilities();  // compiled and supported by this machine, best last
std::string capability();                        // in use; unless set, the best usable, or SN_OPS_CPU_CAPABILITY's
void set_capability(const std::string& name);    // throws std::invalid_argument naming what is allowed

// Paths of a forward. Every path selects the same neighbours in the same order. kTiles is kScreen as large batches have
// it: products are kept a tile at a time. kBytes is kTiles with an 8-bit copy, where the instruction set multiplies it,
// and kByteRows is kScreen with one. kForms is kScreen with the products of small blocks made of forms, too.
enum class Path : std::int32_t {
  kAuto = 0,
  kDirect = 1,
  kScreen = 2,
  kTiles = 3,
  kBytes = 4,
  kByteRows = 5,
  kForms = 6
};
void set_path(Path path);  // for tests; kAuto unless they force one

struct Plan {
  Path path;                     // kDirect or kScreen
  std::int64_t list_capacity;    // entries kept for an anchor between prunings (screen)
  std::int64_t workspace_bytes;  // scratch of the forward beyond its outputs
};
Plan plan_forward(std::int64_t anchors, std::int64_t candidates, std::int64_t dims, std::int64_t k, DType dtype,
                  bool symmetric, int threads);

// Throw std::bad_alloc when scratch cannot be allocated. The caller checks the arguments.
void forward(const ForwardArgs& args, const ThreadPool& pool);
void backward(const BackwardArgs& args, const ThreadPool& pool);

}  // namespace sn::cpu
