// The scheduler: chooses the lane that runs, and lets lanes wait for their warp, their block and their cluster.
#include <bit>
#include <cstdlib>
#include <cstring>
#include <string>

#include "runtime.h"

namespace sn::simt {

void make_runnable(Warp& warp, std::uint32_t lanes) {
  if (warp.runnable == 0 && lanes != 0) {
    warp.place = static_cast<int>(rt.runnable.size());
    rt.runnable.push_back(&warp);
  }
  warp.runnable |= lanes;
}

void make_waiting(Lane& lane) {
  Warp& warp = *lane.warp;
  warp.runnable &= ~(1u << lane.lane);
  if (warp.runnable != 0) return;
  Warp* moved = rt.runnable.back();
  rt.runnable[static_cast<std::size_t>(warp.place)] = moved;
  moved->place = warp.place;
  rt.runnable.pop_back();
  warp.place = -1;
}

Lane* pick() {
  if (rt.runnable.empty()) return nullptr;
  const std::uint64_t word = draw();
  Warp* warp = rt.last;
  if (warp == nullptr || warp->runnable == 0 || (word & 255) >= rt.stay) {
    warp = rt.runnable[below(word, static_cast<std::uint32_t>(rt.runnable.size()))];
    rt.last = warp;
  }
  const int turn = static_cast<int>(word >> 8 & 31);
  const int lane = (std::countr_zero(std::rotr(warp->runnable, turn)) + turn) % kLanes;
  return &warp->lanes[lane];
}

[[noreturn]] void leave(Outcome outcome) {
  rt.outcome = outcome;
  switch_to(rt.main, true);
  std::abort();
}

namespace {

// Reports a kernel that waits forever while something else can always go on.
void expect_progress() {
  if (rt.switches > rt.options.max_switches) {
    throw Fault{kernel_text() + ": more than " + std::to_string(rt.options.max_switches) + " changes of threads"};
  }
}

// Another fiber runs. This one is not runnable any more.
void wait() {
  expect_progress();
  if (Lane* next = pick(); next != nullptr) return switch_to(*next);
  if (!rt.primary_runs) leave(Outcome::kStuck);
  rt.outcome = Outcome::kStuck;  // until the kernel ahead ends
  switch_to(rt.main);
}

}  // namespace

// ---- meetings and barriers ------------------------------------------------------------------------------------------

Meeting& arrive(Op op, Site site) {
  Lane& lane = *current;
  Warp& warp = *lane.warp;
  Meeting& meeting = warp.meetings[lane.phase];
  if (meeting.arrived == 0) {
    meeting.op = op;
    meeting.site = site;
  } else if (meeting.op != op || meeting.site.line != site.line) {
    lane.waits_for = op;
    lane.site = site;
    report("divergent warp collective: lane " + std::to_string(lane.lane) + " is at " + name_of(op) + ", others at " +
               name_of(meeting.op) + " (" + text_of(meeting.site) + ")",
           site);
  }
  if (warp.returned != 0) {
    report(std::string("divergent warp collective: ") + name_of(op) + " with lanes " + hex(warp.returned) +
               " of the warp returned",
           site);
  }
  meeting.arrived |= 1u << lane.lane;
  return meeting;
}

bool await_others(Meeting& meeting) {
  Lane& lane = *current;
  lane.phase ^= 1;
  if (meeting.arrived == kAllLanes) return true;
  lane.waits_for = meeting.op;
  lane.site = meeting.site;
  make_waiting(lane);
  wait();
  return false;
}

void release(Meeting& meeting) {
  Warp& warp = *current->warp;
  meeting.arrived = 0;
  for (int l = 0; l < kLanes; ++l) warp.lanes[l].waits_for = Op::kNothing;
  make_runnable(warp, kAllLanes);
}

namespace {

// Reports lanes that wait at a collective of the warp while this one waits for more than the warp: neither can go on.
void expect_no_meeting(const Warp& warp, Op op, Site site) {
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.arrived == 0) continue;
    report(std::string("divergent barrier: ") + name_of(op) + " while lanes " + hex(meeting.arrived) +
               " of the warp wait at " + name_of(meeting.op) + " (" + text_of(meeting.site) + ")",
           site);
  }
}

void expect_together(Op op, int waiting, int returned, Site first, Site site) {
  if (returned > 0) {
    report(std::string("divergent barrier: ") + name_of(op) + " after " + std::to_string(returned) +
               " threads have returned",
           site);
  }
  if (waiting > 0 && (first.line != site.line || std::strcmp(first.file, site.file) != 0)) {
    report(std::string("divergent barrier: others wait at the ") + name_of(op) + " of " + text_of(first), site);
  }
}

}  // namespace

Meeting& meet(Op op, std::uint64_t value, Site site) {
  Meeting& meeting = arrive(op, site);
  meeting.values[current->lane] = value;
  if (await_others(meeting)) release(meeting);
  return meeting;
}

void sync_warp(Site site) {
  Meeting& meeting = arrive(Op::kSyncWarp, site);
  if (await_others(meeting)) {
    current->warp->sync[kOneWarp] = tick();
    release(meeting);
  }
}

namespace {

void open_block(Block& block, std::uint32_t time, int scope) {
  for (int w = 0; w < block.warp_count; ++w) {
    Warp& warp = block.warps[static_cast<std::size_t>(w)];
    for (int s = kOneWarp; s <= scope; ++s) warp.sync[s] = time;
    for (int l = 0; l < kLanes; ++l) warp.lanes[l].waits_for = Op::kNothing;
    make_runnable(warp, kAllLanes);
  }
}

}  // namespace

void sync_block(Site site) {
  Lane& lane = *current;
  Block& block = *lane.block;
  lane.waits_for = Op::kSyncBlock;
  lane.site = site;
  expect_no_meeting(*lane.warp, Op::kSyncBlock, site);
  expect_together(Op::kSyncBlock, block.waiting, block.returned, block.barrier, site);
  block.barrier = site;
  if (++block.waiting == grid.threads) {
    block.waiting = 0;
    open_block(block, tick(), kOneBlock);
    return;
  }
  make_waiting(lane);
  wait();
}

namespace {

// All threads of the cluster have arrived: those that wait go on, ordered unless one arrived in a way that orders
// nothing. What else lanes wait for they still do.
void open_cluster(Cluster& cluster) {
  cluster.waiting = 0;
  ++cluster.opened;
  const bool ordered = !cluster.relaxed;
  cluster.relaxed = false;
  const std::uint32_t time = ordered ? tick() : 0;
  for (Block* block : cluster.blocks) {
    for (int w = 0; w < block->warp_count; ++w) {
      Warp& warp = block->warps[static_cast<std::size_t>(w)];
      for (int s = kOneWarp; ordered && s <= kOneCluster; ++s) warp.sync[s] = time;
      for (int l = 0; l < kLanes; ++l) {
        Lane& lane = warp.lanes[l];
        if (lane.waits_for != Op::kSyncCluster && lane.waits_for != Op::kWaitCluster) continue;
        lane.waits_for = Op::kNothing;
        make_runnable(warp, 1u << l);
      }
    }
  }
}

// Returns whether this lane was the last to arrive.
bool arrive_at_cluster(Op op, Site site) {
  Lane& lane = *current;
  Cluster& cluster = *lane.block->cluster;
  if (lane.arrivals != lane.waits) report("arrives at a barrier of the cluster twice without waiting", site);
  expect_together(op, cluster.waiting, cluster.returned, cluster.barrier, site);
  cluster.barrier = site;
  ++lane.arrivals;
  if (++cluster.waiting != grid.threads * grid.cluster) return false;
  open_cluster(cluster);
  return true;
}

}  // namespace

void sync_cluster(Site site) {
  Lane& lane = *current;
  lane.site = site;
  lane.waits_for = Op::kSyncCluster;
  expect_no_meeting(*lane.warp, Op::kSyncCluster, site);
  if (lane.block->waiting > 0) {
    report("divergent barrier: sync_cluster while others of the block wait at sync_block (" +
               text_of(lane.block->barrier) + ")",
           site);
  }
  const bool last = arrive_at_cluster(Op::kSyncCluster, site);
  ++lane.waits;
  if (last) return;
  make_waiting(lane);
  wait();
}

void arrive_cluster_relaxed(Site site) {
  current->block->cluster->relaxed = true;
  arrive_at_cluster(Op::kSyncCluster, site);
}

void wait_cluster(Site site) {
  Lane& lane = *current;
  lane.site = site;
  expect_no_meeting(*lane.warp, Op::kWaitCluster, site);
  if (lane.arrivals != lane.waits + 1) report("waits for a barrier of the cluster without having arrived", site);
  ++lane.waits;
  if (lane.arrivals == lane.block->cluster->opened) return;
  lane.waits_for = Op::kWaitCluster;
  make_waiting(lane);
  wait();
}

void wait_for_primary(Site site) {
  Lane& lane = *current;
  if (!grid.dependent || lane.released) return;
  lane.released = true;
  lane.site = site;
  if (!rt.primary_runs) return;
  lane.waits_for = Op::kWaitForPrimary;
  make_waiting(lane);
  wait();
}

void maybe_switch() {
  if ((draw() >> 40 & 7) != 0) return;
  expect_progress();
  Lane* next = pick();
  if (next != nullptr) switch_to(*next);
}

}  // namespace sn::simt
