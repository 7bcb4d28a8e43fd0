// Runs the tests of the harness. Exits non-zero on the first failure.
#include <cstdio>
#include <cstdlib>

#include "simt_test.h"

namespace sn::cuda {
namespace {

int checks = 0;

}  // namespace

void check(bool holds, const std::string& what) {
  if (!holds) {
    std::printf("FAILED: %s\n%d passed, 1 failed\n", what.c_str(), checks);
    std::exit(1);
  }
  ++checks;
}

simt::Options with_seed(std::uint64_t seed) {
  simt::Options options;
  options.seed = seed;
  options.mma_seed = seed;
  return options;
}

}  // namespace sn::cuda

int main(int argc, char** argv) {
  using namespace sn::cuda;
  if (argc == 3 && std::string(argv[1]) == "--overrun") return overrun(argv[2]);
  test_faults();
  test_overruns(argv[0]);
  test_wrappers();
  test_products();
  test_numbers();
  test_slots();
  test_kth_smallest();
  test_thresholds();
  std::printf("%d passed, 0 failed\n", sn::cuda::checks);
  return 0;
}
