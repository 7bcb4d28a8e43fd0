// Scratch memory of a call, allocated in one piece.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sn::cpu {

// Hands out aligned slices of a piece of memory. Without memory it only counts, so that one layout function measures
// and lays out.
class Slices {
 public:
  explicit Slices(void* memory = nullptr) : base_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(std::int64_t count) {
    constexpr std::size_t kAlignment = 64;
    char* slice = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(slice);
  }
  std::size_t bytes() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// Asks for huge pages where `bytes` of fresh memory cover some. Touching 4 KB pages for the first time costs more than
// most of the work on them here.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Scratch of one call. The last call's block, up to kKeptMost bytes, is kept for the next call, so that a training loop
// does not fault in its pages at every step. A second call at the same time gets its own memory.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) {
    if (bytes == 0) return;
    block_ = spare().exchange(nullptr, std::memory_order_acq_rel);
    if (block_ != nullptr && block_->bytes >= bytes) return;
    release(block_);
    block_ = allocate(bytes);
  }
  ~Scratch() {
    if (block_ != nullptr && block_->bytes <= kKeptMost) block_ = spare().exchange(block_, std::memory_order_acq_rel);
    release(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return block_ == nullptr ? nullptr : block_->data; }

 private:
  static constexpr std::size_t kPage = std::size_t{1} << 12;
  static constexpr std::size_t kKeptMost = std::size_t{64} << 20;
  struct Block {
    void* data;
    std::size_t bytes;
  };
  static Block* allocate(std::size_t bytes) {
    const std::size_t size = (bytes + kPage - 1) / kPage * kPage;
    void* data = std::aligned_alloc(kPage, size);
    if (data == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data, size);
    return new Block{data, size};
  }
  static void release(Block* block) {
    if (block == nullptr) return;
    std::free(block->data);
    delete block;
  }
  static std::atomic<Block*>& spare() {
    static std::atomic<Block*> kept{nullptr};
    return kept;
  }
  Block* block_ = nullptr;
};

}  // namespace sn::cpu
