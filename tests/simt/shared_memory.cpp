// Shared memory: records of writes and reads, and asynchronous copies.
#include <algorithm>
#include <cstring>
#include <string>

#include "runtime.h"

namespace sn::simt {

namespace {

constexpr std::uint32_t kCopyBytes = 16;  // of one cp.async, and of a row of ldmatrix

std::uint32_t time_of(Record record) {
  return static_cast<std::uint32_t>(record >> 32);
}
int scope_of(Record record) {
  return static_cast<int>(record >> kScopeShift) & 3;
}
Record tag(int scope, unsigned line) {
  return clock_high | static_cast<Record>(line & 0xffff) << kLineShift | static_cast<Record>(scope) << kScopeShift |
         static_cast<Record>(current->thread);
}

// The least scope that holds this lane and those in `record`.
int spread(Record record, const Lane& me, bool remote) {
  if (remote) return kOneCluster;
  const Record apart = (record ^ static_cast<Record>(me.thread)) & kThreadMask;
  const int distance = apart == 0 ? kOneThread : (apart < kLanes ? kOneWarp : kOneBlock);
  return std::max(distance, scope_of(record));
}
// Whether a barrier orders them before this lane, or this lane did it itself.
bool before(Record record, int scope, const Lane& me) {
  return time_of(record) < me.warp->sync[scope];
}

std::string who(Record record) {
  std::string text;
  switch (scope_of(record)) {
    case kOneThread:
      text = "thread " + std::to_string(record & kThreadMask);
      break;
    case kOneWarp:
      text = "lanes of warp " + std::to_string((record & kThreadMask) / kLanes);
      break;
    case kOneBlock:
      text = "several warps";
      break;
    default:
      text = "several blocks";
  }
  return text + " at line " + std::to_string(record >> kLineShift & 0xffff);
}

std::string place(std::uint32_t byte) {
  return "byte " + std::to_string(byte) + " of shared memory";
}

[[noreturn]] void race(const char* mine, const char* theirs, Record record, std::uint32_t byte, Site site) {
  report(std::string("race: ") + mine + " of " + place(byte) + ", " + theirs + " by " + who(record) +
             " with no barrier between that orders the two",
         site);
}

void expect_written(const Block& block, Record write, std::uint32_t byte, const char* access, Site site) {
  if (time_of(write) < block.start) {
    report(std::string(access) + " of " + place(byte) + ", which nothing has written", site);
  }
  if ((write & kInFlight) != 0) {
    report(std::string(access) + " of " + place(byte) + " before the wait for its copy, issued by " + who(write), site);
  }
}

// ---- one record of each kind: a word's, or a byte's of a split word

void read_record(const Block& block, Record write, Record& read, int least, bool remote, std::uint32_t byte,
                 const char* access, Site site) {
  const Lane& me = *current;
  expect_written(block, write, byte, access, site);
  if (!before(write, std::max(least, spread(write, me, remote)), me)) race(access, "written", write, byte, site);
  // Reads ordered before this one may be forgotten: a write that races with them races with this one too.
  int scope = std::max<int>(least, remote ? kOneCluster : kOneThread);
  if (time_of(read) >= block.start) {
    const int together = std::max(least, spread(read, me, remote));
    if (!before(read, together, me)) {
      if (scope_of(read) == together) return;
      scope = together;
    }
  }
  read = tag(scope, site.line);
}

void write_record(const Block& block, Record& write, Record read, std::uint32_t byte, Site site) {
  const Lane& me = *current;
  if (time_of(write) >= block.start) {
    if ((write & kInFlight) != 0) {
      report("write of " + place(byte) + " before the wait for its copy, issued by " + who(write), site);
    }
    if (!before(write, spread(write, me, false), me)) race("write", "written", write, byte, site);
  }
  if (time_of(read) >= block.start && !before(read, spread(read, me, false), me)) {
    race("write", "read", read, byte, site);
  }
  write = tag(kOneThread, site.line);
}

void atomic_record(const Block& block, Record& write, Record& read, std::uint32_t byte, Site site) {
  const Lane& me = *current;
  expect_written(block, write, byte, "atomic", site);
  const int scope = spread(write, me, false);
  const bool known = before(write, scope, me);
  if (!known && (write & kAtomic) == 0) race("atomic", "written", write, byte, site);
  const bool was_read = time_of(read) >= block.start;
  if (was_read && !before(read, spread(read, me, false), me)) race("atomic", "accessed", read, byte, site);
  // A plain write that is ordered before only part of the block stays on record among the reads: atomics race with
  // those too, so other lanes' atomics still meet it.
  if ((write & kAtomic) == 0 && !before(write, kOneBlock, me)) {
    int together = scope_of(write);
    if (was_read && !before(read, kOneBlock, me)) {
      const Record apart = (read ^ write) & kThreadMask;
      together = std::max({together, scope_of(read),
                           static_cast<int>(apart == 0 ? kOneThread : (apart < kLanes ? kOneWarp : kOneBlock))});
    }
    read = (std::max(time_of(read), time_of(write)) == time_of(write) ? write
                                                                      : (read & ~kThreadMask) | (write & kThreadMask));
    read = (read & ~(Record{3} << kScopeShift)) | static_cast<Record>(together) << kScopeShift;
  }
  write = tag(known ? static_cast<int>(kOneThread) : scope, site.line) | kAtomic;
}

// ---- words, whole or in parts

// Calls each(write, read, byte) for the records of `bytes` bytes: once for a whole word, byte by byte for parts.
template <typename F>
void for_records(Block& block, std::uint32_t position, int bytes, F each) {
  const std::uint32_t end = position + static_cast<std::uint32_t>(bytes);
  for (std::uint32_t word = position / kWordBytes; word * kWordBytes < end; ++word) {
    Record& write = block.writes[word];
    Record& read = block.reads[word];
    const std::uint32_t first = std::max(position, word * kWordBytes);
    const std::uint32_t last = std::min(end, (word + 1) * kWordBytes);
    const bool split = time_of(write) >= block.start && (write & kSplit) != 0;
    if (last - first == kWordBytes && !split) {
      each(write, read, first);
      continue;
    }
    Record* writes = block.byte_writes + word * kWordBytes;
    Record* reads = block.byte_reads + word * kWordBytes;
    if (!split) {
      std::fill_n(writes, kWordBytes, write);
      std::fill_n(reads, kWordBytes, read);
    }
    for (std::uint32_t byte = first; byte < last; ++byte) {
      each(writes[byte % kWordBytes], reads[byte % kWordBytes], byte);
    }
    bool same = true;
    for (std::uint32_t b = 1; b < kWordBytes; ++b) same = same && writes[b] == writes[0] && reads[b] == reads[0];
    write = same ? writes[0] : (clock_high | kSplit);
    read = same ? reads[0] : 0;
  }
}

}  // namespace

const unsigned char* note_read(std::uint32_t position, int bytes, Site site) {
  Block& block = *current->block;
  for_records(block, position, bytes, [&](Record& write, Record& read, std::uint32_t byte) {
    read_record(block, write, read, kOneThread, false, byte, "read", site);
  });
  return block.shared + position;
}

// The lane's own writes must be ordered by sync_warp too.
const unsigned char* note_matrix_read(std::uint32_t position, Site site) {
  Block& block = *current->block;
  for_records(block, position, kCopyBytes, [&](Record& write, Record& read, std::uint32_t byte) {
    read_record(block, write, read, kOneWarp, false, byte, "load_matrix", site);
  });
  return block.shared + position;
}

unsigned char* note_write(std::uint32_t position, int bytes, Site site) {
  Block& block = *current->block;
  for_records(block, position, bytes,
              [&](Record& write, Record& read, std::uint32_t byte) { write_record(block, write, read, byte, site); });
  return block.shared + position;
}

unsigned char* note_atomic(std::uint32_t position, int bytes, Site site) {
  Block& block = *current->block;
  for_records(block, position, bytes,
              [&](Record& write, Record& read, std::uint32_t byte) { atomic_record(block, write, read, byte, site); });
  return block.shared + position;
}

const unsigned char* note_remote_read(int rank, std::uint32_t position, int bytes, Site site) {
  const Lane& me = *current;
  Cluster& cluster = *me.block->cluster;
  if (rank < 0 || rank >= grid.cluster) {
    report("block " + std::to_string(rank) + " of a cluster of " + std::to_string(grid.cluster), site);
  }
  Block& block = *cluster.blocks[static_cast<std::size_t>(rank)];
  if (block.returned > 0) report("read of shared memory of a block of the cluster that has left", site);
  const bool remote = &block != me.block;
  if (remote && block.remote_read <= me.arrivals) {
    block.remote_read = me.arrivals;
    block.remote_reader = site;
  }
  for_records(block, position, bytes, [&](Record& write, Record& read, std::uint32_t byte) {
    read_record(block, write, read, kOneThread, remote, byte, "read", site);
  });
  return block.shared + position;
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

namespace {

constexpr unsigned char kPoison = 0xfb;  // as a float and as a half large and negative

void deliver(Block& block, Copy& copy) {
  if (copy.delivered) return;
  copy.delivered = true;
  if (copy.source == nullptr) {
    std::memset(block.shared + copy.position, 0, kCopyBytes);
  } else {
    std::memcpy(block.shared + copy.position, copy.source, kCopyBytes);
  }
}

}  // namespace

void async_copy(std::uint32_t position, const void* source, bool valid, Site site) {
  Lane& lane = *current;
  Block& block = *lane.block;
  note_write(position, kCopyBytes, site);
  for (std::uint32_t word = 0; word < kCopyBytes / kWordBytes; ++word) {
    block.writes[position / kWordBytes + word] |= kInFlight;
  }
  std::memset(block.shared + position, kPoison, kCopyBytes);
  lane.copies.push_back({position, valid ? source : nullptr, false, site.line});
  ++lane.open_copies;
  const std::uint64_t word = draw();
  if ((word >> 60) < 6) deliver(block, lane.copies.back());
  if ((word >> 56 & 15) < 2) deliver(block, lane.copies[below(word, static_cast<std::uint32_t>(lane.copies.size()))]);
}

void async_commit() {
  Lane& lane = *current;
  lane.groups.push_back(lane.open_copies);
  lane.open_copies = 0;
}

void async_wait(int pending) {
  Lane& lane = *current;
  Block& block = *lane.block;
  if (lane.groups.size() <= static_cast<std::size_t>(pending)) return;
  const std::size_t done = lane.groups.size() - static_cast<std::size_t>(pending);
  std::size_t copies = 0;
  for (std::size_t g = 0; g < done; ++g) copies += lane.groups[g];
  for (std::size_t c = 0; c < copies; ++c) {
    Copy& copy = lane.copies[c];
    deliver(block, copy);
    for (std::uint32_t word = 0; word < kCopyBytes / kWordBytes; ++word) {
      block.writes[copy.position / kWordBytes + word] = tag(kOneThread, copy.line);
    }
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<std::ptrdiff_t>(copies));
  lane.groups.erase(lane.groups.begin(), lane.groups.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace sn::simt
