// The forward kernel for sm_90a: the GPU as a Machine (see forward.cuh), in PTX, and its launch.
//
// Two warp groups per block, no specialisation: every thread loads, multiplies and exponentiates in turn.
#include <cuda_runtime.h>

#include "forward.cuh"

namespace fastattn {

struct Half {};
struct BFloat {};

template <int D>
constexpr int kSharedBytes = (1 + 2 * kStages) * kRows * D * 2 + 1024;  // 1024: tiles start at multiples of it

// clang-format off
#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define U4(x, i) "+r"(x[i]), "+r"(x[i + 1]), "+r"(x[i + 2]), "+r"(x[i + 3])
#define F16(x, i) F4(x, i), F4(x, i + 4), F4(x, i + 8), F4(x, i + 12)
#define F32(x) F16(x, 0), F16(x, 16)
#define F64(x) F32(x), F16(x, 32), F16(x, 48)
#define U32(x) U4(x, 0), U4(x, 4), U4(x, 8), U4(x, 12), U4(x, 16), U4(x, 20), U4(x, 24), U4(x, 28)
#define R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64 R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format on

// Registers that a product writes may not be touched before it has ended, and those it reads not after it has begun.
// The compiler does not know that it runs beside the program: naming them here keeps their other uses where they are.
__device__ __forceinline__ void hold(float (&x)[32]) { asm volatile("" : F32(x)::"memory"); }
__device__ __forceinline__ void hold(float (&x)[64]) { asm volatile("" : F64(x)::"memory"); }
__device__ __forceinline__ void hold(uint32_t (&x)[32]) { asm volatile("" : U32(x)::"memory"); }

#define SCORES(type)                                                                                            \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type \
               " {" R64 "}, %64, %65, add, 1, 1, 0, 0;\n}\n"                                                    \
               : F64(s)                                                                                         \
               : "l"(a), "l"(b), "r"(int(add)))
#define VALUES64(type)                                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type " {" R32 "}, "                \
               "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                       \
               : F32(o)                                                                         \
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b))
#define VALUES128(type)                                                                         \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type " {" R64 "}, "               \
               "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                       \
               : F64(o)                                                                         \
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b))

template <class Element>
__device__ __forceinline__ void wgmma_scores(float (&s)[64], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<Element, Half>) SCORES("f16.f16");
  else SCORES("bf16.bf16");
}

template <class Element>
__device__ __forceinline__ void wgmma_values(float (&o)[32], const uint32_t* p, uint64_t b) {
  if constexpr (std::is_same_v<Element, Half>) VALUES64("f16.f16");
  else VALUES64("bf16.bf16");
}

template <class Element>
__device__ __forceinline__ void wgmma_values(float (&o)[64], const uint32_t* p, uint64_t b) {
  if constexpr (std::is_same_v<Element, Half>) VALUES128("f16.f16");
  else VALUES128("bf16.bf16");
}

template <class Element, int D>
struct Gpu {
  Registers<D> own;
  uint32_t shared;

  template <class F>
  __device__ __forceinline__ void each(F f) { f(own); }
  template <class F>
  __device__ __forceinline__ void groups(F f) { f(own.index / 128); }

  __device__ __forceinline__ uint32_t tile(int i) const { return shared + i * kRows * D * 2; }

  __device__ __forceinline__ void copy(uint32_t to, const uint16_t* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
  }
  __device__ __forceinline__ void committed() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // wgmma reads through the asynchronous proxy: what this thread wrote is made visible to it, then all wait.
  template <int N>
  __device__ __forceinline__ void arrived(std::integral_constant<int, N>) {
    asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;" ::"n"(N) : "memory");
    __syncthreads();
  }

  __device__ __forceinline__ void begin() {
    hold(own.s);
    hold(own.o);
    hold(own.p);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void end() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(own.s);
    hold(own.o);
    hold(own.p);
  }
  __device__ __forceinline__ void scores(int, uint64_t a, uint64_t b, bool add) {
    wgmma_scores<Element>(own.s, a, b, add);
  }
  __device__ __forceinline__ void values(int, int k, uint64_t b) { wgmma_values<Element>(own.o, own.p + 4 * k, b); }

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
  // Two elements in one register, the first in the low half.
  __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    if constexpr (std::is_same_v<Element, Half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
};

template <class Element, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_forward(const __grid_constant__ FastattnForward f) {
  extern __shared__ uint8_t memory[];
  Gpu<Element, D> gpu;
  gpu.shared = (uint32_t(__cvta_generic_to_shared(memory)) + 1023) / 1024 * 1024;
  gpu.own.index = threadIdx.x;
  attend<D>(gpu, f, blockIdx.x);
}

template <class Element, int D>
cudaError_t start(const FastattnForward& f, int64_t blocks) {
  const auto kernel = attention_forward<Element, D>;
  cudaError_t error = cudaSetDevice(f.device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<D>);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), kThreads, kSharedBytes<D>, static_cast<cudaStream_t>(f.stream)>>>(f);
  return cudaGetLastError();
}

int launch(const FastattnForward& f, int64_t blocks) {
  const bool half = f.dtype == FASTATTN_FLOAT16;
  const auto starter = f.head_dim == 64 ? (half ? start<Half, 64> : start<BFloat, 64>)
                                        : (half ? start<Half, 128> : start<BFloat, 128>);
  const cudaError_t error = starter(f, blocks);
  if (error == cudaSuccess) return FASTATTN_OK;
  return fail(FASTATTN_CUDA_ERROR, "CUDA: %s", cudaGetErrorString(error));
}

}  // namespace fastattn
