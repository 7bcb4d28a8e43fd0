// Scratch memory of one call, laid out once and allocated in one piece.
#pragma once

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

// Small scratch comes from the heap. Large scratch is mapped and asks for huge pages: the screening copy is
// read in strides of a panel, one page each, and the first touch of 4 KB pages would cost more than packing
// does.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) {
    if (bytes == 0) return;
#if defined(__linux__)
    if (bytes >= kMapFrom) {
      mapped_ = (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
      region_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (region_ == MAP_FAILED) {
        region_ = nullptr;
        throw std::bad_alloc();
      }
      const auto address = reinterpret_cast<std::uintptr_t>(region_);
      data_ = reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
      madvise(data_, bytes, MADV_HUGEPAGE);
      return;
    }
#endif
    data_ = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() {
#if defined(__linux__)
    if (region_ != nullptr) {
      munmap(region_, mapped_);
      return;
    }
#endif
    std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::size_t kAlignment = 64;
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  static constexpr std::size_t kMapFrom = std::size_t{4} << 20;
  void* data_ = nullptr;
  void* region_ = nullptr;
  std::size_t mapped_ = 0;
};

}  // namespace sn::cpu
