// Wrappers of the tensor core's instructions. ptx.cuh says what a wrapper promises.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/memory.cuh"

#if !defined(SN_SIMT)  // else simt_device.h has these names

namespace sn::cuda {

// ---- tensor cores; every lane takes part ----------------------------------------------------------------------------

namespace detail {
template <bool kTransposed, typename T16>
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], const Shared<T16>& s, int i) {
  static_assert(sizeof(T16) == 2);
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s.address(i))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s.address(i))
                 : "memory");
  }
}
}  // namespace detail

// Four 8 x 8 matrices of 16-bit elements. Lane 8 m + r passes the element where row r of matrix m starts, 16 bytes at a
// multiple of 16. r[m] of lane l: elements 2 (l % 4) and + 1 of row l / 4 of matrix m.
template <typename T16>
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], const Shared<T16>& s, int i) {
  detail::load_matrix_x4<false>(r, s, i);
}
// The same of the transposed matrices: r[m] of lane l: rows 2 (l % 4) and + 1 of column l / 4.
template <typename T16>
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&r)[4], const Shared<T16>& s, int i) {
  detail::load_matrix_x4<true>(r, s, i);
}

// d += A B with A 16 x 16 and B 16 x 8 of T16 (Half or BFloat16), d 16 x 8 of float. With g = lane / 4, t = lane % 4,
// each register of A and B holding two elements, the first in the low half:
//   a[0]: A[g][2t], A[g][2t + 1]       a[1]: the same of row g + 8    a[2], a[3]: as a[0], a[1], columns + 8
//   b[0]: B[2t][g], B[2t + 1][g]       b[1]: rows + 8
//   d[0], d[1]: D[g][2t], D[g][2t + 1]    d[2], d[3]: the same of row g + 8
template <typename T16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T16, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T16, BFloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace sn::cuda

#endif  // SN_SIMT
