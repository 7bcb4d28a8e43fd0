// Micro-benchmarks of a device: what a launch, a byte and a barrier cost there, for the ceilings that measured kernels
// are held against. Plain CUDA, without code of the package.
//
//   sn_gpu_micro [--quick] [--programmatic]
//
// One JSON object on stdout: facts of the device, and for each measurement its unit, all samples and their median.
// Seconds are of one launch, node, ticket or barrier; bytes a second count what is read and what is written. Times are
// taken by events on the stream, except those named `host`. --quick takes a few samples and smaller buffers,
// --programmatic adds graphs with programmatic dependent launch. If a call fails, the exit status is 2 and stderr has
// the reason.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kUnroll = 8;  // loads of 16 bytes a thread has in flight
constexpr int kNodes = 1000;
constexpr int kBarriers = 1000;
constexpr std::int64_t kMiB = 1 << 20;

// ---- kernels --------------------------------------------------------------------------------------------------------

__global__ void null_kernel() {}

// Waits for the kernel before it, as one that was launched early must.
__global__ void dependent_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Barriers of a cluster; none: a null kernel.
__global__ void __launch_bounds__(kThreads) cluster_kernel(int rounds) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  for (int round = 0; round < rounds; ++round) {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
  }
#endif
}

// Every block takes a ticket; the last one starts the count again.
__global__ void __launch_bounds__(kThreads) ticket_kernel(unsigned* ticket) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(ticket, 1u) == gridDim.x - 1) atomicExch(ticket, 0u);
}

// From the L2 and beyond, never the L1. volatile: the next pass must read again.
__device__ __forceinline__ uint4 load_l2(const uint4* source) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(source)));
  return value;
}

// Reads `loads` packs a thread, a multiple of kUnroll, round and round a buffer of `packs`; `stride`, below `packs`, is
// the grid's width modulo that. Both are multiples of 32, so a warp's 512 bytes are never torn, and which SM reads what
// changes from round to round, so that all meet all parts of the L2.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* source, std::int64_t packs, std::int64_t stride, int loads, unsigned* sink) {
  std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) % packs;
  unsigned all = 0;
  for (int load = 0; load < loads; load += kUnroll) {
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      values[u] = load_l2(source + at);
      at += stride;
      if (at >= packs) at -= packs;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) all ^= values[u].x ^ values[u].y ^ values[u].z ^ values[u].w;
  }
  if (all == 0x12345678u) *sink = all;  // never, and the compiler cannot know
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const uint4* source, uint4* destination, std::int64_t packs) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t step = stride * kUnroll;
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < packs; at += step) {
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u * stride < packs) values[u] = load_l2(source + at + u * stride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u * stride < packs) destination[at + u * stride] = values[u];
    }
  }
}

// 16 bytes a thread from shared memory, without bank conflicts, over and over.
__global__ void __launch_bounds__(kThreads) shared_kernel(int rounds, unsigned* sink) {
  __shared__ uint4 rows[kUnroll][kThreads];
  for (int u = 0; u < kUnroll; ++u) rows[u][threadIdx.x] = make_uint4(threadIdx.x, u, 0, 0);
  __syncthreads();
  unsigned all = 0;
  for (int round = 0; round < rounds; ++round) {
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(values[u].x), "=r"(values[u].y), "=r"(values[u].z), "=r"(values[u].w)
                   : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&rows[u][threadIdx.x]))));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) all ^= values[u].x ^ values[u].y ^ values[u].z ^ values[u].w;
  }
  if (all == 0x12345678u) *sink = all;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

#define CHECK(call) check((call), #call)
void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "micro: %s: %s\n", call, cudaGetErrorString(error));
  std::exit(2);
}

struct Measurement {
  std::string name;
  std::string unit;
  std::vector<double> samples;
};

class Bench {
 public:
  explicit Bench(bool quick) : quick_(quick) {
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin_));
    CHECK(cudaEventCreate(&end_));
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;
  ~Bench() {
    CHECK(cudaEventDestroy(begin_));
    CHECK(cudaEventDestroy(end_));
    CHECK(cudaStreamDestroy(stream_));
  }

  cudaStream_t stream() const { return stream_; }
  int samples(int wanted) const { return quick_ ? std::max(3, wanted / 10) : wanted; }
  const std::vector<Measurement>& results() const { return results_; }
  void note(const std::string& name, const std::string& unit, std::vector<double> samples) {
    results_.push_back({name, unit, std::move(samples)});
  }

  // Seconds between two events around the work, once.
  template <class F>
  double seconds(F work) {
    CHECK(cudaEventRecord(begin_, stream_));
    work();
    CHECK(cudaEventRecord(end_, stream_));
    CHECK(cudaEventSynchronize(end_));
    float milliseconds = 0.0f;
    CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return 1e-3 * static_cast<double>(milliseconds);
  }
  // `count` things a call.
  template <class F>
  void time(const std::string& name, int wanted, double count, F work) {
    for (int warm = 0; warm < 2; ++warm) seconds(work);
    std::vector<double> all;
    for (int sample = 0; sample < samples(wanted); ++sample) all.push_back(seconds(work) / count);
    note(name, "s", all);
  }
  template <class F>
  void rate(const std::string& name, int wanted, double bytes, F work) {
    for (int warm = 0; warm < 2; ++warm) seconds(work);
    std::vector<double> all;
    for (int sample = 0; sample < samples(wanted); ++sample) all.push_back(bytes / seconds(work));
    note(name, "B/s", all);
  }
  // By the host's clock, until `work` returns.
  template <class F, class G>
  void host_time(const std::string& name, int wanted, double count, F work, G after) {
    std::vector<double> all;
    for (int sample = -2; sample < samples(wanted); ++sample) {
      CHECK(cudaStreamSynchronize(stream_));
      const auto start = std::chrono::steady_clock::now();
      work();
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
      after();
      if (sample >= 0) all.push_back(passed.count() / count);
    }
    note(name, "s", all);
  }

  // What `work` launches on the stream, `nodes` times, as a graph.
  template <class F>
  cudaGraphExec_t graph(int nodes, F work) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    work();  // the first launch loads a kernel, which a capture may not allow
    CHECK(cudaStreamSynchronize(stream_));
    CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int node = 0; node < nodes; ++node) work();
    CHECK(cudaStreamEndCapture(stream_, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaGraphUpload(exec, stream_));
    CHECK(cudaStreamSynchronize(stream_));
    return exec;
  }
  // Seconds a node of a graph of `nodes` launches: each one's time and the gap to the next.
  template <class F>
  void time_graph(const std::string& name, int wanted, int nodes, double count, F work) {
    const cudaGraphExec_t exec = graph(nodes, work);
    time(name, wanted, nodes * count, [&] { CHECK(cudaGraphLaunch(exec, stream_)); });
    CHECK(cudaGraphExecDestroy(exec));
  }

 private:
  bool quick_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  std::vector<Measurement> results_;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int blocks, int threads, cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}
template <class... Params, class... Args>
void launch_with(cudaLaunchAttribute attribute, void (*kernel)(Params...), int blocks, int threads, cudaStream_t stream,
                 Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

int attribute_of(cudaDeviceAttr which) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

// Blocks that a multiprocessor holds.
template <class... Params>
int resident_blocks(void (*kernel)(Params...)) {
  int blocks = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  return blocks;
}

// ---- measurements ---------------------------------------------------------------------------------------------------

void measure_launches(Bench& bench, int multiprocessors, unsigned* ticket) {
  const cudaStream_t stream = bench.stream();
  constexpr int kQueued = 500;  // fewer than a stream queues before a launch waits
  const auto many = [&] {
    for (int i = 0; i < kQueued; ++i) launch(null_kernel, 1, 32, stream);
  };
  bench.time("null_kernel_stream", 30, kQueued, many);
  bench.host_time("null_kernel_stream_host", 30, kQueued, many, [] {});
  bench.time_graph("null_kernel_graph", 50, kNodes, 1, [&] { launch(null_kernel, 1, 32, stream); });
  bench.time_graph("null_kernel_graph_full_grid", 50, kNodes, 1,
                   [&] { launch(null_kernel, 2 * multiprocessors, kThreads, stream); });
  bench.time_graph("ticket_kernel_graph_full_grid", 50, kNodes, 1,
                   [&] { launch(ticket_kernel, 2 * multiprocessors, kThreads, stream, ticket); });

  const cudaGraphExec_t one = bench.graph(1, [&] { launch(null_kernel, 1, 32, stream); });
  const auto start = [&] { CHECK(cudaGraphLaunch(one, stream)); };
  const auto wait = [&] { CHECK(cudaStreamSynchronize(stream)); };
  bench.host_time("graph_of_one_host_submit", 200, 1, start, wait);
  bench.host_time(
      "graph_of_one_host_to_done", 200, 1,
      [&] {
        start();
        wait();
      },
      [] {});
  bench.time("graph_of_one_between_events", 200, 1, start);
  CHECK(cudaGraphExecDestroy(one));
}

void measure_clusters(Bench& bench) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 8;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  const cudaStream_t stream = bench.stream();
  bench.time_graph("cluster_of_8_null_kernel_graph", 50, kNodes, 1,
                   [&] { launch_with(cluster, cluster_kernel, 8, kThreads, stream, 0); });
  bench.time("cluster_of_8_barrier", 30, kBarriers,
             [&] { launch_with(cluster, cluster_kernel, 8, kThreads, stream, kBarriers); });
}

void measure_programmatic(Bench& bench) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const cudaStream_t stream = bench.stream();
  bench.time_graph("dependent_kernel_graph", 30, kNodes, 1, [&] { launch(dependent_kernel, 1, 32, stream); });
  bench.time_graph("dependent_kernel_graph_programmatic", 30, kNodes, 1,
                   [&] { launch_with(early, dependent_kernel, 1, 32, stream); });
}

void measure_memory(Bench& bench, int multiprocessors, bool quick, unsigned* sink) {
  const cudaStream_t stream = bench.stream();
  std::int64_t large = (quick ? 256 : 1024) * kMiB;
  std::size_t free_bytes = 0, total_bytes = 0;
  CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
  large = std::min(large, static_cast<std::int64_t>(free_bytes / 4));
  const std::int64_t packs = large / static_cast<std::int64_t>(kWarp * sizeof(uint4)) * kWarp;
  const auto bytes = static_cast<std::size_t>(packs) * sizeof(uint4);
  uint4* source = nullptr;
  uint4* destination = nullptr;
  CHECK(cudaMalloc(&source, bytes));
  CHECK(cudaMalloc(&destination, bytes));
  CHECK(cudaMemsetAsync(source, 0x5a, bytes, stream));
  CHECK(cudaMemsetAsync(destination, 0, bytes, stream));
  CHECK(cudaStreamSynchronize(stream));

  const double size = static_cast<double>(bytes);
  const int copy_blocks = multiprocessors * resident_blocks(copy_kernel);
  bench.rate("copy_kernel", 20, 2.0 * size,
             [&] { launch(copy_kernel, copy_blocks, kThreads, stream, source, destination, packs); });
  uint4 ends[2] = {};
  CHECK(cudaMemcpy(&ends[0], destination, sizeof(uint4), cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(&ends[1], destination + packs - 1, sizeof(uint4), cudaMemcpyDeviceToHost));
  for (const uint4& end : ends) {
    if (end.x != 0x5a5a5a5au || end.w != 0x5a5a5a5au) {
      std::fprintf(stderr, "micro: the copy is not what was copied\n");
      std::exit(2);
    }
  }
  bench.rate("copy_memcpy", 20, 2.0 * size,
             [&] { CHECK(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToDevice, stream)); });
  bench.rate("dram_write_memset", 20, size, [&] { CHECK(cudaMemsetAsync(destination, 0, bytes, stream)); });
  const int read_blocks = multiprocessors * resident_blocks(read_kernel);
  const std::int64_t readers = static_cast<std::int64_t>(read_blocks) * kThreads;
  const auto read = [&](const std::string& name, std::int64_t part, double wanted_bytes) {
    const double once = static_cast<double>(readers) * kUnroll * sizeof(uint4);
    const int loads = std::max(1, static_cast<int>(wanted_bytes / once + 0.5)) * kUnroll;
    bench.rate(name, 15, once * (loads / kUnroll),
               [&] { launch(read_kernel, read_blocks, kThreads, stream, source, part, readers % part, loads, sink); });
  };
  read("dram_read", packs, size);
  for (const int mib : {8, 16, 24, 32, 40}) {
    read("l2_read_" + std::to_string(mib) + "_mib", mib * kMiB / static_cast<std::int64_t>(sizeof(uint4)),
         quick ? 1e9 : 4e9);
  }
  const int rounds = quick ? 2000 : 10000;
  bench.rate("shared_read", 15, static_cast<double>(multiprocessors * 4) * kThreads * rounds * kUnroll * sizeof(uint4),
             [&] { launch(shared_kernel, multiprocessors * 4, kThreads, stream, rounds, sink); });
  CHECK(cudaFree(source));
  CHECK(cudaFree(destination));
}

// ---- report ---------------------------------------------------------------------------------------------------------

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

void print(const cudaDeviceProp& facts, bool quick, const std::vector<Measurement>& results) {
  int driver = 0, runtime = 0;
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  std::string name;
  for (const char* letter = facts.name; *letter != '\0'; ++letter) {
    if (*letter != '"' && *letter != '\\' && static_cast<unsigned char>(*letter) >= 0x20) name += *letter;
  }
  const std::pair<const char*, cudaDeviceAttr> attributes[] = {
      {"multiprocessors", cudaDevAttrMultiProcessorCount},
      {"l2_bytes", cudaDevAttrL2CacheSize},
      {"shared_bytes_a_block", cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {"shared_bytes_a_multiprocessor", cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {"clock_khz", cudaDevAttrClockRate},
      {"memory_clock_khz", cudaDevAttrMemoryClockRate},
      {"memory_bus_bits", cudaDevAttrGlobalMemoryBusWidth},
  };
  std::printf(
      "{\"device\": {\"name\": \"%s\", \"capability\": \"%d.%d\", \"memory_bytes\": %zu, \"driver\": %d, \"runtime\": "
      "%d",
      name.c_str(), facts.major, facts.minor, facts.totalGlobalMem, driver, runtime);
  for (const auto& [label, which] : attributes) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, which, 0) == cudaSuccess) {
      std::printf(", \"%s\": %d", label, value);
    } else {  // a fact that this driver no longer reports
      static_cast<void>(cudaGetLastError());
      std::printf(", \"%s\": null", label);
    }
  }
  std::printf("}, \"quick\": %s, \"measurements\": {", quick ? "true" : "false");
  for (std::size_t m = 0; m < results.size(); ++m) {
    const Measurement& one = results[m];
    std::printf("%s\n\"%s\": {\"unit\": \"%s\", \"median\": %.6g, \"samples\": [", m == 0 ? "" : ",", one.name.c_str(),
                one.unit.c_str(), median(one.samples));
    for (std::size_t s = 0; s < one.samples.size(); ++s) std::printf("%s%.6g", s == 0 ? "" : ", ", one.samples[s]);
    std::printf("]}");
  }
  std::printf("}}\n");
}

}  // namespace

// ---- main -----------------------------------------------------------------------------------------------------------

int main(int argc, char** argv) {
  bool quick = false, programmatic = false;
  for (int a = 1; a < argc; ++a) {
    if (std::strcmp(argv[a], "--quick") == 0) {
      quick = true;
    } else if (std::strcmp(argv[a], "--programmatic") == 0) {
      programmatic = true;
    } else {
      std::fprintf(stderr, "micro: expected --quick or --programmatic, got %s\n", argv[a]);
      return 2;
    }
  }
  CHECK(cudaSetDevice(0));
  cudaDeviceProp facts{};
  CHECK(cudaGetDeviceProperties(&facts, 0));
  const int multiprocessors = attribute_of(cudaDevAttrMultiProcessorCount);
  unsigned* words = nullptr;  // a ticket, and where nothing is ever written
  CHECK(cudaMalloc(&words, 2 * sizeof(unsigned)));
  CHECK(cudaMemset(words, 0, 2 * sizeof(unsigned)));
  CHECK(cudaDeviceSynchronize());  // the benchmark's stream does not wait for the default one
  {
    Bench bench(quick);
    // Clocks rise under load.
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(quick ? 50 : 300)) {
      bench.seconds([&] { launch(shared_kernel, multiprocessors * 4, kThreads, bench.stream(), 2000, words + 1); });
    }
    measure_memory(bench, multiprocessors, quick, words + 1);
    measure_launches(bench, multiprocessors, words);
    const bool has_clusters = attribute_of(cudaDevAttrClusterLaunch) != 0;
    if (has_clusters) measure_clusters(bench);
    if (facts.major >= 9 && programmatic) measure_programmatic(bench);
    print(facts, quick, bench.results());
  }
  CHECK(cudaFree(words));
  return 0;
}
