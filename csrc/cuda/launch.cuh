// The one way to launch a kernel, with shared memory and clusters, in the type that the features have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "cuda/ptx.cuh"
#include "sn_types.h"

#if !defined(SN_SIMT)  // else simt_device.h has these names

namespace sn::cuda {

// ---- launching ------------------------------------------------------------------------------------------------------

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;  // blocks of a cluster; divides `blocks`
  // Blocks may start before the kernel ahead in the stream has ended, from compute capability 9.0 of device and code
  // on (launches_dependents in plan/sizes.h). The kernel calls wait_for_primary() first (ptx.cuh).
  bool dependent = false;
};

// What a configuration refers to.
struct LaunchAttributes {
  cudaLaunchAttribute each[2];
};

// Lets blocks of a kernel have this much shared memory on the current device. The limit is raised, never lowered:
// another thread may be about to launch the same kernel with more.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> limits;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = limits[{kernel, device}];
  if (bytes <= limit) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) limit = bytes;
  return error;
}

// Lets a kernel have clusters that not every device of its architecture holds, on the current device.
inline cudaError_t allow_wide_clusters(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.contains({kernel, device})) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// What a launch of this shape needs said, in `config`, which refers to `attributes`, and of the kernel.
inline cudaError_t configure(const void* kernel, const LaunchShape& shape, cudaStream_t stream,
                             LaunchAttributes& attributes, cudaLaunchConfig_t& config) {
  if (shape.blocks <= 0 || shape.blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (shape.shared_bytes > kPlainSharedBytes) {
    const cudaError_t error = allow_shared(kernel, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  attributes = {};
  config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes.each;
  if (shape.cluster > 1) {
    if (shape.cluster > kPortableCluster) {
      const cudaError_t error = allow_wide_clusters(kernel);
      if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute& attribute = attributes.each[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (shape.dependent) {
    cudaLaunchAttribute& attribute = attributes.each[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaSuccess;
}

// Launches on `stream` and reports what went wrong with this launch, configuration errors included.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream, Args... args) {
  LaunchAttributes attributes;
  cudaLaunchConfig_t config;
  const cudaError_t error = configure(reinterpret_cast<const void*>(kernel), shape, stream, attributes, config);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Clusters of this shape that the current device holds at once. 0 also where that cannot be found out; the runtime
// keeps no error of it.
template <typename... Params>
int active_clusters(void (*kernel)(Params...), const LaunchShape& shape) {
  LaunchAttributes attributes;
  cudaLaunchConfig_t config;
  int clusters = 0;
  cudaError_t error = configure(reinterpret_cast<const void*>(kernel), shape, nullptr, attributes, config);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess) return clusters;
  static_cast<void>(cudaGetLastError());
  return 0;
}

}  // namespace sn::cuda

#endif  // SN_SIMT

// ---- the same on both sides -----------------------------------------------------------------------------------------

namespace sn::cuda {

// enqueue<T>() with the type that the features have.
template <class Enqueue>
cudaError_t for_type(DType dtype, const Enqueue& enqueue) {
  switch (dtype) {
    case DType::kFloat32:
      return enqueue.template operator()<float>();
    case DType::kFloat64:
      return enqueue.template operator()<double>();
    case DType::kFloat16:
      return enqueue.template operator()<Half>();
    case DType::kBFloat16:
      return enqueue.template operator()<BFloat16>();
  }
  return cudaErrorInvalidValue;
}
// The same for kernels that have no fp64.
template <class Enqueue>
cudaError_t for_narrow_type(DType dtype, const Enqueue& enqueue) {
  if (dtype == DType::kFloat64) return cudaErrorInvalidValue;
  return for_type(dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorInvalidValue;
    } else {
      return enqueue.template operator()<T>();
    }
  });
}

}  // namespace sn::cuda
