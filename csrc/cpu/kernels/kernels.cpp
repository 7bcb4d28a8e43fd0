// The hot loops, compiled once per instruction set into a namespace of its own (SN_CPU_CAPABILITY names it).
//
// No file here may instantiate a standard-library template or define an inline function that is shared: the linker
// keeps one copy of such code, and that may be the one compiled for the newest CPU.
// GCC's AVX-512 headers start vectors from an undefined register; older releases warn of it in whatever function they
// are inlined into.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../kernels.h"

#include "../../sn_math.h"

#ifndef SN_CPU_CAPABILITY
#error "compile kernels.cpp with -DSN_CPU_CAPABILITY=generic, avx2, avx512 or avx512_vnni"
#endif

#define SN_LAMBDA_INLINE __attribute__((always_inline))
#define SN_STRINGIFY_(x) #x
#define SN_STRINGIFY(x) SN_STRINGIFY_(x)

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace sn::cpu::SN_CPU_CAPABILITY {
namespace {

#include "simd.h"
//
#include "direct.h"
//
#include "blocks.h"
//
#include "backward.h"

// ---- dispatch over dtypes -------------------------------------------------------------------------------------------

template <class Function>
SN_FORCE_INLINE auto with_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat16:
      return function(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return function(static_cast<BFloat16*>(nullptr));
    case DType::kFloat64:  // callers that serve fp64 check for it first
    case DType::kFloat32:
      break;
  }
  return function(static_cast<float*>(nullptr));
}

void direct_block_any(DType dtype, const void* const* x, std::int64_t nx, const void* const* z, std::int64_t nz,
                      std::int64_t dims, bool upper, void* out, std::int64_t pitch) {
  if (dtype == DType::kFloat64) return direct_block<double>(x, nx, z, nz, dims, upper, out, pitch);
  with_dtype(dtype, [&]<class T>(T*) { direct_block<T>(x, nx, z, nz, dims, upper, out, pitch); });
}

bool turn_panel_any(DType dtype, const FeatureView& features, std::int64_t panel, std::int64_t dims, float* out) {
  return with_dtype(dtype, [&]<class T>(T*) { return turn_panel<T>(features, panel, dims, out); });
}

#include "products.h"
//
#include "forms.h"
//
#include "pack.h"
//
#include "lists.h"
//
#include "epilogue.h"
//
#include "rows.h"
//
#include "smallest.h"
//
#include "refine.h"

// ---- small kernels --------------------------------------------------------------------------------------------------

// A value is finite when not all bits of its exponent are set. Comparisons of floats would miss NaN.
template <class Bits, Bits kExponent>
bool all_finite_bits(const FeatureView& features, std::int64_t dims, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const Bits* row = static_cast<const Bits*>(features.data) + r * features.row_stride;
    Bits bad = 0;
    for (std::int64_t c = 0; c < dims; ++c) bad |= static_cast<Bits>((row[c] & kExponent) == kExponent ? 1 : 0);
    if (bad != 0) return false;
  }
  return true;
}

bool all_finite(DType dtype, const FeatureView& features, std::int64_t dims, std::int64_t begin, std::int64_t end) {
  switch (dtype) {
    case DType::kFloat32:
      return all_finite_bits<std::uint32_t, 0x7f800000u>(features, dims, begin, end);
    case DType::kFloat64:
      return all_finite_bits<std::uint64_t, 0x7ff0000000000000u>(features, dims, begin, end);
    case DType::kFloat16:
      return all_finite_bits<std::uint16_t, 0x7c00u>(features, dims, begin, end);
    case DType::kBFloat16:
      return all_finite_bits<std::uint16_t, 0x7f80u>(features, dims, begin, end);
  }
  return false;
}

void sampled_mean_any(DType dtype, const FeatureView* sides, int side_count, std::int64_t dims, float* mean,
                      float* scratch) {
  with_dtype(dtype, [&]<class T>(T*) { sampled_mean<T>(sides, side_count, dims, mean, scratch); });
}
bool pack_any(const Screen& screen, const ScreenSide& side, std::int64_t first, std::int64_t last) {
  return with_dtype(screen.dtype, [&]<class T>(T*) { return pack<T>(screen, side, first, last); });
}
void refine_rows_any(const Screen& screen, std::int64_t p) {
  with_dtype(screen.dtype, [&]<class T>(T*) { refine_rows<T>(screen, p); });
}
void gather_columns_any(DType dtype, const FeatureView& features, const std::int32_t* order, std::int64_t begin,
                        std::int64_t end, std::int64_t column, std::int64_t columns, std::int64_t pitch, float* out) {
  with_dtype(dtype, [&]<class T>(T*) { gather_columns<T>(features, order, begin, end, column, columns, pitch, out); });
}
void backward_rows_any(DType dtype, const FeatureView& own, const FeatureView& other, const EdgeLists& edges,
                       std::int64_t dims, std::int64_t begin, std::int64_t end, void* out) {
  if (dtype == DType::kFloat64) return backward_rows<double>(own, other, edges, dims, begin, end, out);
  with_dtype(dtype, [&]<class T>(T*) { backward_rows<T>(own, other, edges, dims, begin, end, out); });
}
void copy_columns_any(DType dtype, const FeatureView& features, std::int64_t column, std::int64_t width, float* out) {
  with_dtype(dtype, [&]<class T>(T*) { copy_columns<T>(features, column, width, out); });
}
void backward_columns_any(DType dtype, const ColumnBlock& block, const EdgeLists& edges, std::int64_t dims,
                          std::int64_t begin, std::int64_t end, void* out) {
  with_dtype(dtype, [&]<class T>(T*) { backward_columns<T>(block, edges, dims, begin, end, out); });
}

void backward_hubs_any(DType dtype, const FeatureView& own, const FeatureView& other, const EdgeLists& edges,
                       std::int64_t dims, std::int64_t begin, std::int64_t end, void* out) {
  with_dtype(dtype, [&]<class T>(T*) { backward_hubs<T>(own, other, edges, dims, begin, end, out); });
}
void backward_hub_columns_any(DType dtype, const ColumnBlock& block, const EdgeLists& edges, std::int64_t dims,
                              std::int64_t begin, std::int64_t end, void* out) {
  with_dtype(dtype, [&]<class T>(T*) { backward_hub_columns<T>(block, edges, dims, begin, end, out); });
}

}  // namespace

const Kernels kTable = {
    SN_STRINGIFY(SN_CPU_CAPABILITY),
#if defined(__AVX512F__)
    0.083,
#elif defined(__AVX2__) || defined(__ARM_FEATURE_FMA)
    0.115,
#else
    5.0,  // a multiply-add is a call
#endif
#if defined(__AVX512VNNI__)
    0.036,
    true,
    96,
#else
    0.045,  // a multiplication of pairs and an addition
    false,
    48,  // forms cost as much, products more
#endif
#if defined(__AVX512F__)
    32,
#elif defined(__AVX2__)
    96,  // eight candidates a vector: scalars of anchors are loaded for every one
#else
    std::int64_t{1} << 62,  // not measured
#endif
    kRowVectors * kLanes,
    all_finite,
    direct_block_any,
    turn_panel_any,
    panel_block,
    smallest,
    sampled_mean_any,
    pack_any,
    tile_products,
    tile_epilogue,
    mirror_tile,
    screen_rows,
    prune,
    refine_rows_any,
    gather_columns_any,
    refine_columns,
    refine_pairs,
    reverse_slots,
    backward_rows_any,
    copy_columns_any,
    backward_columns_any,
    backward_hubs_any,
    backward_hub_columns_any,
};

}  // namespace sn::cpu::SN_CPU_CAPABILITY
