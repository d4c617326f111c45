// One engine per instruction set: the same sources, compiled into a namespace of their own.
#pragma once

#include "interface.h"
#include "threads.h"

namespace fastattn::cpu {
namespace {

constexpr int64_t element_bytes(int64_t dtype) {
  return dtype == FASTATTN_FLOAT64 ? 8 : dtype == FASTATTN_FLOAT32 ? 4 : 2;
}

}  // namespace
}  // namespace fastattn::cpu

// library.cpp has checked the arguments of these calls. They return false if memory runs out.
#define FASTATTN_DECLARE_ENGINE(VARIANT)                                                                            \
  namespace fastattn::cpu::VARIANT {                                                                                \
  bool forward(const FastattnAttention&, const FastattnOperands&, const Team&);                                     \
  bool backward(const FastattnAttention&, const FastattnOperands&, const FastattnGradients&, const Team&);          \
  bool decode(const FastattnDecode&, const Team&);                                                                  \
  bool linear(const FastattnLinear&, const Team&);                                                                  \
  void normalise(const FastattnNorm&);                                                                              \
  bool rotate(const FastattnRotate&, const Team&);                                                                               \
  void append_quantised(const FastattnAppend&);                                                                     \
  bool dropout(const FastattnDropout&, const Team&);                                                                \
  bool rms_norm(const FastattnRmsNorm&, const Team&);                                                               \
  bool gate(const FastattnGate&, const Team&);                                                                      \
  }

FASTATTN_DECLARE_ENGINE(baseline)
#if defined(__x86_64__)
FASTATTN_DECLARE_ENGINE(avx2)
FASTATTN_DECLARE_ENGINE(avx512)
FASTATTN_DECLARE_ENGINE(avx512_bf16)  // products of pairs; avx512 does the rest
#endif
#ifdef FASTATTN_TEST_VARIANTS
FASTATTN_DECLARE_ENGINE(wide)  // the 16 lanes and products of pairs of avx512_bf16, on AVX2
#endif
