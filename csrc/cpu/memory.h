// Scratch memory of one call, laid out once and allocated in one piece.
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

// Hands out aligned slices. Without memory it only counts, so one layout function serves both purposes.
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

// Asks for huge pages where `bytes` of fresh memory cover some. The first touch of 4 KB pages costs more than
// most of what is done with them here.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Scratch of one call. Up to kKept bytes come from one block that is kept between calls, so that a training
// loop does not fault its pages in again and again; a second call at the same time, and anything larger, gets
// memory of its own.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : kept_(bytes <= kKept) {
    if (bytes == 0) return;
    if (kept_) data_ = spare().exchange(nullptr, std::memory_order_acquire);
    if (data_ != nullptr) return;
    const std::size_t size = kept_ ? kKept : (bytes + kAlignment - 1) / kAlignment * kAlignment;
    data_ = std::aligned_alloc(kAlignment, size);
    if (data_ == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data_, size);
  }
  ~Scratch() {
    if (kept_) data_ = spare().exchange(data_, std::memory_order_acq_rel);
    std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::size_t kAlignment = std::size_t{1} << 12;
  static constexpr std::size_t kKept = std::size_t{4} << 20;
  static std::atomic<void*>& spare() {
    static std::atomic<void*> block{nullptr};
    return block;
  }
  bool kept_;
  void* data_ = nullptr;
};

}  // namespace sn::cpu
