// Slots of tickets: counters in the memory of each device that a launch finds at zero and leaves at zero, so that
// nothing has to zero them ahead of it. No two launches that may run at the same time have one slot:
//
// * launches on one stream follow one another, so a stream has a slot of its own, from its first call on;
// * a launch that is captured may be replayed on any stream, beside any other, so it has one that no other launch ever
//   gets. (Copies of one captured graph that run at once would share it, but also every output.)
//
// Where slots have run out the caller takes another path.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace sn::cuda {

inline constexpr int kSlots = 1024;
inline constexpr int kStreamSlots = 256;  // of these, at most; the rest are of captured launches
inline constexpr int kNoSlot = -1;

class SlotRegistry {
 public:
  // `stream` tells streams of the process apart for as long as it lives; a handle may come again, so it is none.
  int of_stream(int device, std::uint64_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = streams_.find({device, stream});
    if (known != streams_.end()) return known->second;
    int& taken = taken_[device].first;
    if (taken == kStreamSlots) return kNoSlot;
    return streams_[{device, stream}] = taken++;
  }
  int of_captured(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int& taken = taken_[device].second;
    return taken == kSlots - kStreamSlots ? kNoSlot : kStreamSlots + taken++;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, std::uint64_t>, int> streams_;
  std::map<int, std::pair<int, int>> taken_;  // of a device: by streams, by captured launches
};

}  // namespace sn::cuda
