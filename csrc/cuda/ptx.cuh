// Instructions of sm_90a that C++ cannot express. Names in quotation marks are sections of the PTX ISA.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastattn {

struct Half {};
struct BFloat {};

// "Parallel Synchronization and Communication Instructions: mbarrier". One barrier is 8 bytes of shared memory.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// "membar / fence": makes the barriers that a thread initialised visible to other threads. "Proxies": makes what it
// wrote visible to TMA and wgmma, which do not access shared memory by ordinary loads and stores.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// "bar, barrier": the named barriers 0 to 15.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "elect.sync": true in one thread of a warp.
__device__ __forceinline__ bool elect() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred chosen;\nelect.sync _|chosen, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, chosen;\n}" : "=r"(chosen));
  return chosen != 0;
}

// "setmaxnreg"
template <int Count, bool More>
__device__ __forceinline__ void setmaxnreg() {
  if constexpr (More) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// "cp.async.bulk.tensor": a box between global and shared memory. Coordinates: element, head of the tile of heads (a box
// has all of them), row, tile of heads, batch entry.
__device__ __forceinline__ void tma_load(uint32_t to, const void* map, int column, int row, int head, int batch,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, 0, %3, %4, %5}], [%6];"
      ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void tma_store(uint32_t from, const void* map, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%1, 0, %2, %3, %4}], [%5];" ::"l"(map),
               "r"(column), "r"(row), "r"(head), "r"(batch), "r"(from)
               : "memory");
}
// "cp.async.bulk.wait_group": with .read, waits until the sources have been read.
__device__ __forceinline__ void tma_stored() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// "cp.async.bulk": adjacent bytes, addresses and count multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void tma_prefetch(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void load_shared(uint32_t from, float (&x)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(from));
}

// "Asynchronous Warpgroup Level Matrix Instructions: wgmma". Below are lists of registers of each length.
// clang-format off
#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define U4(x, i) "+r"(x[i]), "+r"(x[i + 1]), "+r"(x[i + 2]), "+r"(x[i + 3])
#define F8(x, i) F4(x, i), F4(x, i + 4)
#define F32(x, i) F8(x, i), F8(x, i + 8), F8(x, i + 16), F8(x, i + 24)
#define FLOATS16(x) F8(x, 0), F8(x, 8)
#define FLOATS32(x) F32(x, 0)
#define FLOATS64(x) F32(x, 0), F32(x, 32)
#define FLOATS128(x) F32(x, 0), F32(x, 32), F32(x, 64), F32(x, 96)
#define WORDS8(x) U4(x, 0), U4(x, 4)
#define WORDS16(x) U4(x, 0), U4(x, 4), U4(x, 8), U4(x, 12)
#define WORDS32(x) WORDS16(x), U4(x, 16), U4(x, 20), U4(x, 24), U4(x, 28)
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define R16 TEN() "%10, %11, %12, %13, %14, %15"
#define R32 TEN() TEN(1) TEN(2) "%30, %31"
#define R64 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63"
#define R128 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

// Nothing may use the registers that a product writes before it ends, nor change those that it reads after it has
// begun. The compiler does not know that products are asynchronous: naming the registers here keeps it from moving
// their other uses.
#define HOLD(count, type, list) \
  __device__ __forceinline__ void hold(type (&x)[count]) { asm volatile("" : list(x)::"memory"); }
HOLD(16, float, FLOATS16)
HOLD(32, float, FLOATS32)
HOLD(64, float, FLOATS64)
HOLD(128, float, FLOATS128)
HOLD(8, uint32_t, WORDS8)
HOLD(16, uint32_t, WORDS16)
HOLD(32, uint32_t, WORDS32)

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// s (+)= a b^T, 64 x n x 16, for 2 `count` == n; both operands from shared memory.
#define SCORES_OF(type, n, regs, a_, b_, add_, ...)                                                                    \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32."   \
               type " {" regs "}, %" #a_ ", %" #b_ ", add, 1, 1, 0, 0;\n}\n"                                           \
               : __VA_ARGS__                                                                                           \
               : "l"(a), "l"(b), "r"(int(add)))
#define SCORES(count, n, regs, a_, b_, add_, list)                                                                     \
  template <class Element>                                                                                             \
  __device__ __forceinline__ void wgmma_scores(float (&s)[count], uint64_t a, uint64_t b, bool add) {                  \
    if constexpr (std::is_same_v<Element, Half>) SCORES_OF("f16.f16", n, regs, a_, b_, add_, list(s));                 \
    else SCORES_OF("bf16.bf16", n, regs, a_, b_, add_, list(s));                                                       \
  }
SCORES(16, 32, R16, 16, 17, 18, FLOATS16)
SCORES(32, 64, R32, 32, 33, 34, FLOATS32)
SCORES(64, 128, R64, 64, 65, 66, FLOATS64)

// o += p b, 64 x n x 16; p from registers, b transposed.
#define VALUES_OF(type, n, regs, p_, b_, ...)                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type " {" regs "}, {" p_ "}, %" #b_ ", 1, 1, 1, 1;\n" \
               : __VA_ARGS__                                                                       \
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b))
#define VALUES(count, n, regs, p_, b_, list)                                                              \
  template <class Element>                                                                                \
  __device__ __forceinline__ void wgmma_values(float (&o)[count], const uint32_t* p, uint64_t b) {        \
    if constexpr (std::is_same_v<Element, Half>) VALUES_OF("f16.f16", n, regs, p_, b_, list(o));          \
    else VALUES_OF("bf16.bf16", n, regs, p_, b_, list(o));                                                \
  }
VALUES(32, 64, R32, "%32, %33, %34, %35", 36, FLOATS32)
VALUES(64, 128, R64, "%64, %65, %66, %67", 68, FLOATS64)
VALUES(128, 256, R128, "%128, %129, %130, %131", 132, FLOATS128)

}  // namespace fastattn
