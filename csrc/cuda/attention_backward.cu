// The backward kernels for sm_90a.
#include "backward.cuh"
#include "gpu.cuh"

namespace fastattn {

template <class Element, int D, Pass kPass, bool kCapped>
__global__ void __launch_bounds__(PassShape<D, kPass>::kThreads, 1)
    attention_backward(const __grid_constant__ PassPlan plan, const __grid_constant__ Maps maps) {
  using Shape = PassShape<D, kPass>;
  extern __shared__ uint8_t memory[];
  prefetch(maps, 0, kOperands);
  Gpu<Element, Shape, PassRegisters<Shape, Plain>, kCapped> gpu = {{}, maps, first_tile_address(memory)};
  gpu.own.index = threadIdx.x % kGroupThreads;
  run_pass<Shape>(gpu, plan, warp_group());
}

template <class Element>
__global__ void __launch_bounds__(kGroupThreads)
    attention_backward_rows(const __grid_constant__ FastattnBackward b, const __grid_constant__ Maps maps) {
  Gpu<Element, void, RowRegisters, false> gpu = {{}, maps, 0};
  gpu.own.index = threadIdx.x;
  prepare_rows(gpu, b, blockIdx.x);
}

template <class Element, int D, Pass kPass>
int start(const FastattnBackward& b, const Maps& maps) {
  const PassPlan plan = make_plan<PassShape<D, kPass>>(b);
  if (plan.works == 0) return FASTATTN_OK;
  const auto kernel = b.f.softcap > 0.0f ? attention_backward<Element, D, kPass, true>
                                         : attention_backward<Element, D, kPass, false>;
  return start<PassShape<D, kPass>>(kernel, plan, maps);
}

template <class Element, int D>
int start(const FastattnBackward& b) {
  const FastattnForward& f = b.f;
  cudaError_t error = cudaSetDevice(f.device);
  if (error != cudaSuccess) return failed(error);
  using Any = PassShape<D, kQueriesAlone>;  // boxes of TMA are the same in all passes
  const PassPlan plan = make_plan<Any>(b);
  Maps maps;
  for (int i = 0; i < kOperands; ++i) {
    if (const int status = encode(operand_map<Any>(plan, Operand(i)), Operand(i), f.dtype, b.rows, &maps.of[i])) {
      return status;
    }
  }
  if (const int64_t blocks = count_row_works(f)) {
    attention_backward_rows<Element>
        <<<unsigned(blocks), kGroupThreads, 0, static_cast<cudaStream_t>(f.stream)>>>(b, maps);
    error = cudaGetLastError();
    if (error != cudaSuccess) return failed(error);
  }
  int status = FASTATTN_OK;
  if constexpr (D > 64) {
    status = start<Element, D, kKeysAlone>(b, maps);
    if (status == FASTATTN_OK) status = start<Element, D, kValuesAlone>(b, maps);
  } else {
    status = start<Element, D, kKeysAndValues>(b, maps);
  }
  return status == FASTATTN_OK ? start<Element, D, kQueriesAlone>(b, maps) : status;
}

template <class Element>
int start(const FastattnBackward& b) {
  return b.f.head_dim == 64    ? start<Element, 64>(b)
         : b.f.head_dim == 128 ? start<Element, 128>(b)
                               : start<Element, 256>(b);
}

int launch(const FastattnBackward& b) {
  return b.f.dtype == FASTATTN_FLOAT16 ? start<Half>(b) : start<BFloat>(b);
}

}  // namespace fastattn
