// The C interface has only pointers and numbers, no PyTorch and no Python. `fastattn/backends/cuda.py` calls it.
//
// `library.cuh` defines its functions; a library defines the launches that they call.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

extern "C" {

// The version of this interface: each change of the declarations below raises it.
#define FASTATTN_ABI 5

enum FastattnDtype { FASTATTN_FLOAT16 = 0, FASTATTN_BFLOAT16 = 1 };

enum FastattnStatus { FASTATTN_OK = 0, FASTATTN_BAD_ARGUMENT = 1, FASTATTN_CUDA_ERROR = 2 };

// An open side of the window. Other sides are at most 2^30 in size.
#define FASTATTN_OPEN (INT64_C(1) << 40)

// An offset for packed sequences: it aligns the last query of each with its last key.
#define FASTATTN_ENDS (INT64_C(1) << 40)

// Strides are in elements, of batch entry, head and row; elements of a row are adjacent. Query row i sees the keys from
// i + q_offset - left to i + q_offset + right.
//
// Packed sequences follow one another in q, k and v, with B = 1. `batch` is then the number of sequences, and Lq and Lk
// count all rows. Sequence s has the query rows q_starts[s] to q_starts[s + 1] - 1, and keys likewise. If k_used is not
// null, it uses only the first k_used[s] of its keys.
struct FastattnForward {
  const void *q, *k, *v;  // (B, Hq, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, D)
  void* out;              // (B, Hq, Lq, D)
  float* lse;             // (B, Hq, Lq), contiguous
  float* statistics;      // (2, B, Hq, Lq), contiguous, base 2: the maximum of each row's scores with sink, and the
                          // logarithm of its sum of exponentials relative to it; 0 and 0 for a row without keys
  const float* sinks;     // (Hq,), contiguous, or null: one more logit in each row's softmax, without a value
  const int32_t *q_starts, *k_starts, *k_used;  // (batch + 1,), (batch + 1,), (batch,), contiguous, or null
  const int64_t* q_offsets;                     // (batch,), contiguous, instead of q_offset; or null
  void* stream;           // cudaStream_t
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t q_offset, left, right;
  int32_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  int32_t dtype, device;
  float scale;
  float softcap;  // scores become softcap tanh(score / softcap); 0 means none
};

// The gradients of a call of the forward pass, which has filled `out` and `statistics`; `lse` is not used. dk and dv
// are summed over the query heads that share a key head. Rows that belong to no sequence are not written.
struct FastattnBackward {
  FastattnForward f;
  const void* dout;   // (B, Hq, Lq, D)
  const float* dlse;  // (B, Hq, Lq), contiguous, or null
  void *dq, *dk, *dv; // like q, k, v, in any strides
  float* rows;        // scratch at a multiple of 16 bytes: fastattn_backward_rows floats per query head and batch
                      // entry; gets pairs of the lse of each row, in base 2, and its delta = sum dout out - dlse
  int64_t dout_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
};

int fastattn_abi();
const char* fastattn_source_digest();
const char* fastattn_last_error();  // the last error of this thread
int fastattn_supported(int dtype, int head_dim);
int fastattn_attention_forward(const FastattnForward* arguments);
int64_t fastattn_backward_rows(const FastattnForward* arguments);
int fastattn_attention_backward(const FastattnBackward* arguments);
}

namespace fastattn {

inline thread_local char error_text[256] = "";

inline int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(error_text, sizeof error_text, format, values);
  va_end(values);
  return status;
}

}  // namespace fastattn
