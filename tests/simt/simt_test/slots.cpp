// Slots of tickets (slots.h): who gets which.
#include "cuda/slots.h"

#include <algorithm>
#include <set>
#include <thread>
#include <vector>

#include "simt_test.h"

namespace sn::cuda {

void test_slots() {
  SlotRegistry registry;
  const int first = registry.of_stream(0, 7);
  check(first >= 0 && registry.of_stream(0, 7) == first, "a stream keeps its slot");
  check(registry.of_stream(0, 8) != first, "another stream has another");
  check(registry.of_stream(100, 7) == registry.of_stream(100, 7), "devices beyond 64");

  std::set<int> captured;
  for (int launch = 0; launch < kSlots - kStreamSlots; ++launch) captured.insert(registry.of_captured(0));
  check(captured.size() == kSlots - kStreamSlots, "a captured launch has a slot that no other gets");
  check(*captured.begin() >= kStreamSlots && *captured.rbegin() < kSlots, "and no stream");
  check(registry.of_captured(0) == kNoSlot && registry.of_captured(1) != kNoSlot, "until they run out, on one device");

  std::set<int> streams;
  for (std::uint64_t stream = 7; streams.size() < kStreamSlots; ++stream) streams.insert(registry.of_stream(0, stream));
  check(*streams.begin() == 0 && *streams.rbegin() == kStreamSlots - 1, "slots of streams");
  check(registry.of_stream(0, 1u << 30) == kNoSlot, "none is left for one more");
  check(registry.of_stream(0, 7) == first, "those that have one keep it");

  // Threads that ask at the same time.
  SlotRegistry shared;
  constexpr int kAsking = 8;
  constexpr int kEach = 64;
  std::vector<std::vector<int>> of_captured(kAsking);
  std::vector<std::vector<int>> of_streams(kAsking);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kAsking; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        of_captured[t].push_back(shared.of_captured(3));
        of_streams[t].push_back(shared.of_stream(3, static_cast<std::uint64_t>(i % 16)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::set<int> all;
  for (const std::vector<int>& slots : of_captured) all.insert(slots.begin(), slots.end());
  check(all.size() == kAsking * kEach, "no two threads' captured launches have one slot");
  check(std::all_of(of_streams.begin(), of_streams.end(), [&](const auto& slots) { return slots == of_streams[0]; }),
        "all threads find a stream's slot");
}

}  // namespace sn::cuda
