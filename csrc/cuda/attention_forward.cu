// The forward kernel for sm_90a, and the functions of the C interface.
#include "gpu.cuh"
#include "library.cuh"

namespace fastattn {

template <class Element, int D, bool kCapped>
__global__ void __launch_bounds__(Shape<D>::kThreads, 1)
    attention_forward(const __grid_constant__ Plan plan, const __grid_constant__ Maps maps) {
  extern __shared__ uint8_t memory[];
  prefetch(maps, 0, kForwardOperands);
  Gpu<Element, Shape<D>, Registers<Shape<D>, Plain>, kCapped> gpu = {{}, maps, first_tile_address(memory)};
  gpu.own.index = threadIdx.x % kGroupThreads;
  attend<Shape<D>>(gpu, plan, warp_group());
}

template <class Element, int D>
int start(const FastattnForward& f) {
  const cudaError_t error = cudaSetDevice(f.device);
  if (error != cudaSuccess) return failed(error);
  const Plan plan = make_plan(f);
  Maps maps;
  for (int i = 0; i < kForwardOperands; ++i) {
    const OperandMap map = operand_map<Shape<D>>(plan, Operand(i));
    if (const int status = encode(map, Operand(i), f.dtype, f.out, &maps.of[i])) return status;
  }
  const auto kernel = f.softcap > 0.0f ? attention_forward<Element, D, true> : attention_forward<Element, D, false>;
  return start<Shape<D>>(kernel, plan, maps);
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
