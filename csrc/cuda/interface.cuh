// The C interface: no PyTorch, no Python, nothing but pointers and numbers. Its other side is
// `fastattn/backends/cuda.py`.
//
// Included by one source per library, which defines `fastattn::launch`.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "layout.cuh"

#ifndef FASTATTN_DIGEST
#define FASTATTN_DIGEST ""  // of the sources; the build passes it
#endif

extern "C" {

// Counts changes of what is declared here.
#define FASTATTN_ABI 4

enum FastattnDtype { FASTATTN_FLOAT16 = 0, FASTATTN_BFLOAT16 = 1 };

enum FastattnStatus { FASTATTN_OK = 0, FASTATTN_BAD_ARGUMENT = 1, FASTATTN_CUDA_ERROR = 2 };

// A side of the window that forbids nothing; sides are at most 2^30 in size else.
#define FASTATTN_OPEN (INT64_C(1) << 40)

// An offset of packed sequences: the last query of each stands at its last key.
#define FASTATTN_ENDS (INT64_C(1) << 40)

// Strides in elements, of batch entry, head and row; elements of a row are adjacent. Query row i sees the keys from
// i + q_offset - left to i + q_offset + right.
//
// Packed sequences lie one after the other in q, k and v with B = 1. `batch` is then how many there are, and Lq and Lk
// are all the rows; sequence s has the query rows from q_starts[s], before q_starts[s + 1], likewise keys, and of those
// the first k_used[s], if that is not null.
struct FastattnForward {
  const void *q, *k, *v;  // (B, Hq, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, D)
  void* out;              // (B, Hq, Lq, D)
  float* lse;             // (B, Hq, Lq), contiguous
  const float* sinks;     // (Hq,), contiguous, or null: one more logit in each row's softmax, with no value
  const int32_t *q_starts, *k_starts, *k_used;  // (batch + 1,), (batch + 1,), (batch,), contiguous, or null
  const int64_t* q_offsets;                     // (batch,), contiguous, in place of q_offset, or null
  void* stream;           // cudaStream_t
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t q_offset, left, right;
  int32_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  int32_t dtype, device;
  float scale;
  float softcap;  // scores become softcap tanh(score / softcap); 0 is none
};

int fastattn_abi();
const char* fastattn_source_digest();
const char* fastattn_last_error();  // of this thread's last call that failed
int fastattn_supported(int dtype, int head_dim);
int fastattn_attention_forward(const FastattnForward* arguments);
}

namespace fastattn {

int launch(const FastattnForward& f);

// of schedule.cuh
inline int heads_of_tile(const FastattnForward& f);
inline int64_t count_works(const FastattnForward& f, int heads);

static thread_local char error_text[256] = "";

static int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(error_text, sizeof error_text, format, values);
  va_end(values);
  return status;
}

// What TMA takes (CUDA driver API, cuTensorMapEncodeTiled): addresses and strides at multiples of 16 bytes, strides
// below 2^40 bytes, and none of 0; heads and batch entries of stride 0 are one place (schedule.cuh), rows cannot be.
static bool fits(const void* pointer, const int64_t* stride, int32_t rows) {
  bool fits = reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && (stride[2] != 0 || rows <= 1);
  for (int i = 0; i < 3; ++i) fits = fits && stride[i] % 8 == 0 && stride[i] >= 0 && stride[i] < int64_t(1) << 39;
  return fits;
}

}  // namespace fastattn

int fastattn_abi() { return FASTATTN_ABI; }

const char* fastattn_source_digest() { return FASTATTN_DIGEST; }

const char* fastattn_last_error() { return fastattn::error_text; }

int fastattn_supported(int dtype, int head_dim) {
  const bool half = dtype == FASTATTN_FLOAT16 || dtype == FASTATTN_BFLOAT16;
  return half && (head_dim == 64 || head_dim == 128 || head_dim == 256);
}

int fastattn_attention_forward(const FastattnForward* arguments) {
  using fastattn::fail;
  if (arguments == nullptr) return fail(FASTATTN_BAD_ARGUMENT, "arguments: expected a pointer, got null");
  const FastattnForward& f = *arguments;
  constexpr int64_t longest = 1 << 30;  // positions and their sums are 32-bit
  if (!fastattn_supported(f.dtype, f.head_dim)) {
    return fail(FASTATTN_BAD_ARGUMENT, "dtype, head_dim: expected 0 or 1, and 64, 128 or 256, got %d, %d", f.dtype,
                f.head_dim);
  }
  if (f.batch < 0 || f.q_len < 0 || f.kv_len < 0 || f.q_len > longest || f.kv_len > longest) {
    return fail(FASTATTN_BAD_ARGUMENT, "batch, q_len, kv_len: expected 0 to 2^30, got %d, %d, %d", f.batch, f.q_len,
                f.kv_len);
  }
  if (f.q_heads < 1 || f.kv_heads < 1 || f.q_heads % f.kv_heads != 0) {
    return fail(FASTATTN_BAD_ARGUMENT, "q_heads: expected a multiple of kv_heads == %d, got %d", f.kv_heads, f.q_heads);
  }
  if (!(f.scale > 0.0f)) return fail(FASTATTN_BAD_ARGUMENT, "scale: expected more than 0, got %g", f.scale);
  if (!(f.softcap >= 0.0f && f.softcap <= 3e38f)) {
    return fail(FASTATTN_BAD_ARGUMENT, "softcap: expected a finite number, 0 for none, got %g", f.softcap);
  }
  if ((f.q_starts == nullptr) != (f.k_starts == nullptr) || (f.k_used != nullptr && f.k_starts == nullptr)) {
    return fail(FASTATTN_BAD_ARGUMENT, "q_starts, k_starts, k_used: expected the first two or none, or all three");
  }
  const bool ends = f.q_starts != nullptr && f.q_offset == FASTATTN_ENDS;
  if (!ends && (f.q_offset < -longest || f.q_offset > longest)) {
    return fail(FASTATTN_BAD_ARGUMENT, "q_offset: expected at most 2^30 in size, got %lld", (long long)f.q_offset);
  }
  for (const int64_t side : {f.left, f.right}) {
    if (side != FASTATTN_OPEN && (side < -longest || side > longest)) {
      return fail(FASTATTN_BAD_ARGUMENT, "left, right: expected at most 2^30 in size, or 2^40, got %lld, %lld",
                  (long long)f.left, (long long)f.right);
    }
  }
  const int64_t works = fastattn::count_works(f, fastattn::heads_of_tile(f));
  if (works == 0) return FASTATTN_OK;
  if (works > INT32_MAX) {
    return fail(FASTATTN_BAD_ARGUMENT, "expected at most 2^31 - 1 works of a block, got %lld", (long long)works);
  }
  if (!fastattn::fits(f.q, f.q_stride, f.q_len) || !fastattn::fits(f.k, f.k_stride, f.kv_len) ||
      !fastattn::fits(f.v, f.v_stride, f.kv_len) || !fastattn::fits(f.out, f.out_stride, f.q_len)) {
    return fail(FASTATTN_BAD_ARGUMENT,
                "q, k, v, out: expected rows apart from one another at multiples of 16 bytes, below 2^40 bytes");
  }
  return fastattn::launch(f);
}
