// The GPU as a Machine (see forward.cuh), and the calls of the CUDA runtime for a launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "forward.cuh"
#include "ptx.cuh"

namespace fastattn {

struct Maps {
  CUtensorMap of[kOperands];
};

template <class T, int N, int>
using Plain = T[N];

// `Shape` is from layout.cuh or passes.cuh; `Own` are the registers of a thread.
template <class Element, class Shape, class Own, bool kCapped>
struct Gpu {
  using Registers = Own;
  Own own;
  const Maps& maps;
  uint32_t first;  // address of the first tile

  __device__ __forceinline__ uint32_t shared() const { return first; }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int blocks() const { return gridDim.x; }
  static __device__ __forceinline__ constexpr bool capped() { return kCapped; }
  __device__ __forceinline__ uint32_t barrier(int i) const { return first + Shape::kBarrierPlace + 8 * i; }

  template <class F>
  __device__ __forceinline__ void each(F f) { f(own); }
  template <class F>
  __device__ __forceinline__ void elected(F f) {
    if (__shfl_sync(0xFFFFFFFF, threadIdx.x / 32 % 4, 0) == 0 && elect()) f();
  }

  template <int Count, bool More>
  __device__ __forceinline__ void registers() { setmaxnreg<Count, More>(); }
  __device__ __forceinline__ void init(int i, int count) { mbarrier_init(barrier(i), count); }
  __device__ __forceinline__ void publish() {
    fence_mbarrier_init();
    fence_proxy_async();
  }
  __device__ __forceinline__ void wait(int i, int parity) { mbarrier_wait(barrier(i), parity); }
  __device__ __forceinline__ void arrive(int i) { mbarrier_arrive(barrier(i)); }
  __device__ __forceinline__ void release(int i) {
    if (elect()) mbarrier_arrive(barrier(i));
  }
  __device__ __forceinline__ void expect(int i, uint32_t bytes) { mbarrier_expect(barrier(i), bytes); }
  __device__ __forceinline__ void load(Operand operand, uint32_t to, int column, const Place& place, int i) {
    tma_load(to, &maps.of[operand], column, place.row, place.head, place.batch, barrier(i));
  }
  __device__ __forceinline__ void copy(uint32_t to, const void* from, uint32_t bytes, int i) {
    bulk_load(to, from, bytes, barrier(i));
  }
  __device__ __forceinline__ void store(Operand operand, uint32_t from, int column, const Place& place) {
    tma_store(from, &maps.of[operand], column, place.row, place.head, place.batch);
  }
  __device__ __forceinline__ void stored() { tma_stored(); }
  __device__ __forceinline__ void put(uint32_t to, uint32_t value) { store_shared(to, value); }
  __device__ __forceinline__ void get(uint32_t from, float (&values)[4]) { load_shared(from, values); }
  __device__ __forceinline__ void fence() { fence_proxy_async(); }
  __device__ __forceinline__ void sync(int id, int threads) { bar_sync(id, threads); }
  __device__ __forceinline__ void signal(int id, int threads) { bar_arrive(id, threads); }

  template <class... Arrays>
  __device__ __forceinline__ void begin(Arrays Own::*... arrays) {
    (hold(own.*arrays), ...);
    wgmma_fence();
  }
  __device__ __forceinline__ void commit() { wgmma_commit(); }
  template <int N, class... Arrays>
  __device__ __forceinline__ void finish(std::integral_constant<int, N>, Arrays Own::*... arrays) {
    wgmma_wait<N>();
    (hold(own.*arrays), ...);
  }
  template <class To>
  __device__ __forceinline__ void scores(To Own::*to, uint64_t a, uint64_t b, bool add) {
    wgmma_scores<Element>(own.*to, a, b, add);
  }
  template <class To, class From>
  __device__ __forceinline__ void values(To Own::*to, From Own::*from, int k, uint64_t b) {
    wgmma_values<Element>(own.*to, own.*from + 4 * k, b);
  }

  __device__ __forceinline__ int again(int x) {
    asm volatile("" : "+r"(x));
    return x;
  }
  template <class Array>
  __device__ __forceinline__ void quad_max(Array Own::*array) {
#pragma unroll
    for (float& x : own.*array) {
      x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
      x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
    }
  }
  template <class Array>
  __device__ __forceinline__ void quad_sum(Array Own::*array) {
#pragma unroll
    for (float& x : own.*array) {
      x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
      x += __shfl_xor_sync(0xFFFFFFFF, x, 2);
    }
  }

  __device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ float log2(float x) { return log2f(x); }
  __device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // Eight adjacent elements, the first at a multiple of 16 bytes.
  __device__ __forceinline__ void elements(const uint16_t* from, float (&x)[8]) {
    const uint4 all = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = uint16_t(words[i / 2] >> i % 2 * 16);
      if constexpr (std::is_same_v<Element, Half>) asm("cvt.f32.f16 %0, %1;" : "=f"(x[i]) : "h"(bits));
      else x[i] = __uint_as_float(uint32_t(bits) << 16);
    }
  }
  // Two elements in one register, the first in the low half.
  __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    if constexpr (std::is_same_v<Element, Half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
};

__device__ __forceinline__ uint32_t first_tile_address(const uint8_t* memory) {
  return (uint32_t(__cvta_generic_to_shared(memory)) + 1023) / 1024 * 1024;
}

// The warp group of a thread. The shuffle shows the compiler that it is the same in all threads of a warp.
__device__ __forceinline__ int warp_group() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / kGroupThreads, 0); }

__device__ __forceinline__ void prefetch(const Maps& maps, int first, int count) {
  if (threadIdx.x > 0) return;
  for (int i = 0; i < count; ++i) tma_prefetch(&maps.of[first + i]);
}

static int failed(cudaError_t error) { return fail(FASTATTN_CUDA_ERROR, "CUDA: %s", cudaGetErrorString(error)); }

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looks up the driver's function, so that the library links only the runtime.
static Encode find_encode(cudaError_t* error) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  *error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return *error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// Encodes the map of one operand. Without keys its base may be null; `instead` replaces it, and nothing is loaded
// through it.
static int encode(const OperandMap& map, Operand operand, int dtype, const void* instead, CUtensorMap* encoded) {
  cudaError_t error = cudaSuccess;
  static const Encode function = find_encode(&error);
  if (error != cudaSuccess) return failed(error);
  if (function == nullptr) return fail(FASTATTN_CUDA_ERROR, "CUDA: the driver has no cuTensorMapEncodeTiled");
  cuuint64_t size[5], stride[4];
  for (int i = 0; i < 5; ++i) size[i] = map.size[i] > 0 ? map.size[i] : 1;
  for (int i = 0; i < 4; ++i) stride[i] = map.stride[i];
  const cuuint32_t box[] = {64, cuuint32_t(map.box_heads), cuuint32_t(map.box_rows), 1, 1}, steps[] = {1, 1, 1, 1, 1};
  const auto type = dtype == FASTATTN_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      function(encoded, type, 5, const_cast<void*>(map.size[2] > 0 ? map.base : instead), size, stride, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return FASTATTN_OK;
  constexpr const char* names[] = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"};
  return fail(FASTATTN_CUDA_ERROR, "CUDA: no tensor map for %s: driver error %d", names[operand], int(result));
}

// Starts `kernel` with one block for each multiprocessor, or for each work if there are fewer.
template <class Shape, class Call>
int start(void (*kernel)(Call, Maps), const Call& plan, const Maps& maps) {
  const FastattnForward& f = plan.f;
  int multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, f.device);
  if (error != cudaSuccess) return failed(error);
  constexpr int bytes = Shape::kSharedBytes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return failed(error);
  const int blocks = plan.works < multiprocessors ? plan.works : multiprocessors;
  kernel<<<blocks, Shape::kThreads, bytes, static_cast<cudaStream_t>(f.stream)>>>(plan, maps);
  error = cudaGetLastError();
  return error == cudaSuccess ? FASTATTN_OK : failed(error);
}

}  // namespace fastattn
