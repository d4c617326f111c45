// The forward kernel for sm_90a: the GPU as a Machine (see forward.cuh), and its launch.
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

template <class Element, class Shape, bool kCapped>
struct Gpu {
  Registers<Shape, Plain> own;
  const Plan& plan;
  const Maps& maps;
  uint32_t first;  // address of the first tile

  __device__ __forceinline__ uint32_t shared() const { return first; }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int blocks() const { return gridDim.x; }
  static __device__ __forceinline__ constexpr bool capped() { return kCapped; }
  __device__ __forceinline__ uint32_t barrier(int i) const { return first + Shape::kTiles + 8 * i; }

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
  __device__ __forceinline__ void store(uint32_t from, int column, const Place& place) {
    tma_store(from, &maps.of[kOut], column, place.row, place.head, place.batch);
  }
  __device__ __forceinline__ void stored() { tma_stored(); }
  __device__ __forceinline__ void put(uint32_t to, uint32_t value) { store_shared(to, value); }
  __device__ __forceinline__ void fence() { fence_proxy_async(); }
  __device__ __forceinline__ void sync(int id, int threads) { bar_sync(id, threads); }
  __device__ __forceinline__ void signal(int id, int threads) { bar_arrive(id, threads); }

  __device__ __forceinline__ void begin_scores() {
    hold(own.s);
    wgmma_fence();
  }
  __device__ __forceinline__ void begin_values() {
    hold(own.o);
    hold(own.p);
    wgmma_fence();
  }
  __device__ __forceinline__ void commit() { wgmma_commit(); }
  template <int N>
  __device__ __forceinline__ void finish(std::integral_constant<int, N>) {
    wgmma_wait<N>();
    hold(own.s);
    if constexpr (N == 0) {
      hold(own.o);
      hold(own.p);
    }
  }
  __device__ __forceinline__ void scores(uint64_t a, uint64_t b, bool add) { wgmma_scores<Element>(own.s, a, b, add); }
  __device__ __forceinline__ void values(int k, uint64_t b) { wgmma_values<Element>(own.o, own.p + 4 * k, b); }

  __device__ __forceinline__ int again(int x) {
    asm volatile("" : "+r"(x));
    return x;
  }
  __device__ __forceinline__ void quad_max() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own.peak[r] = fmaxf(own.peak[r], __shfl_xor_sync(0xFFFFFFFF, own.peak[r], 1));
      own.peak[r] = fmaxf(own.peak[r], __shfl_xor_sync(0xFFFFFFFF, own.peak[r], 2));
    }
  }
  __device__ __forceinline__ void quad_sum() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own.sum[r] += __shfl_xor_sync(0xFFFFFFFF, own.sum[r], 1);
      own.sum[r] += __shfl_xor_sync(0xFFFFFFFF, own.sum[r], 2);
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
  // Two elements in one register, the first in the low half.
  __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    if constexpr (std::is_same_v<Element, Half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
};

template <class Element, int D, bool kCapped>
__global__ void __launch_bounds__(Shape<D>::kThreads, 1)
    attention_forward(const __grid_constant__ Plan plan, const __grid_constant__ Maps maps) {
  extern __shared__ uint8_t memory[];
  if (threadIdx.x == 0) {
    for (int operand = 0; operand < kOperands; ++operand) tma_prefetch(&maps.of[operand]);
  }
  const uint32_t first = (uint32_t(__cvta_generic_to_shared(memory)) + 1023) / 1024 * 1024;
  Gpu<Element, Shape<D>, kCapped> gpu = {{}, plan, maps, first};
  gpu.own.index = threadIdx.x % kGroupThreads;
  // The same in all threads of a warp, and the compiler sees that it is.
  attend<Shape<D>>(gpu, plan, __shfl_sync(0xFFFFFFFF, threadIdx.x / kGroupThreads, 0));
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function is looked up, so that nothing is linked but the runtime.
static Encode find_encode(cudaError_t* error) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  *error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return *error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

static CUresult encode(Encode function, const OperandMap& map, int dtype, CUtensorMap* encoded) {
  cuuint64_t size[5], stride[4];
  for (int i = 0; i < 5; ++i) size[i] = map.size[i] > 0 ? map.size[i] : 1;  // no keys: nothing is loaded
  for (int i = 0; i < 4; ++i) stride[i] = map.stride[i];
  const cuuint32_t box[] = {64, cuuint32_t(map.box_heads), cuuint32_t(map.box_rows), 1, 1}, steps[] = {1, 1, 1, 1, 1};
  const auto type = dtype == FASTATTN_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return function(encoded, type, 5, const_cast<void*>(map.base), size, stride, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <class Element, int D>
int start(const FastattnForward& f) {
  const auto failed = [](cudaError_t error) {
    return fail(FASTATTN_CUDA_ERROR, "CUDA: %s", cudaGetErrorString(error));
  };
  const auto kernel = f.softcap > 0.0f ? attention_forward<Element, D, true> : attention_forward<Element, D, false>;
  cudaError_t error = cudaSetDevice(f.device);
  if (error != cudaSuccess) return failed(error);
  static const Encode function = find_encode(&error);
  if (error != cudaSuccess) return failed(error);
  if (function == nullptr) return fail(FASTATTN_CUDA_ERROR, "CUDA: the driver has no cuTensorMapEncodeTiled");
  const Plan plan = make_plan(f);
  Maps maps;
  for (int i = 0; i < kOperands; ++i) {
    OperandMap map = operand_map<Shape<D>>(plan, Operand(i));
    if (map.size[2] == 0) map.base = f.out;  // no keys: the base may be null
    if (const CUresult result = encode(function, map, f.dtype, &maps.of[i]); result != CUDA_SUCCESS) {
      constexpr const char* names[] = {"q", "k", "v", "out"};
      return fail(FASTATTN_CUDA_ERROR, "CUDA: no tensor map for %s: driver error %d", names[i], int(result));
    }
  }
  int multiprocessors = 0;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, f.device);
  if (error != cudaSuccess) return failed(error);
  constexpr int bytes = Shape<D>::kSharedBytes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return failed(error);
  const int blocks = plan.works < multiprocessors ? plan.works : multiprocessors;
  kernel<<<blocks, Shape<D>::kThreads, bytes, static_cast<cudaStream_t>(f.stream)>>>(plan, maps);
  error = cudaGetLastError();
  return error == cudaSuccess ? FASTATTN_OK : failed(error);
}

template <class Element>
int start(const FastattnForward& f) {
  return f.head_dim == 64    ? start<Element, 64>(f)
         : f.head_dim == 128 ? start<Element, 128>(f)
                             : start<Element, 256>(f);
}

int launch(const FastattnForward& f) {
  return f.dtype == FASTATTN_FLOAT16 ? start<Half>(f) : start<BFloat>(f);
}

}  // namespace fastattn
