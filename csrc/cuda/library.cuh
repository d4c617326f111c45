// The functions of the C interface check a call and launch it.
//
// One source of a library includes this file and defines `fastattn::launch` for both passes.
#pragma once

#include <initializer_list>

#include "passes.cuh"

#ifndef FASTATTN_DIGEST
#define FASTATTN_DIGEST ""  // of the sources; the build passes it
#endif

namespace fastattn {

int launch(const FastattnForward& f);
int launch(const FastattnBackward& b);

// Whether TMA takes an operand (CUDA driver API, cuTensorMapEncodeTiled): addresses and strides are multiples of 16
// bytes, and strides are above 0 and below 2^40 bytes. Stride 0 of heads and batch entries is allowed here, since they
// become one place (schedule.cuh); stride 0 of rows is not.
static bool fits(const void* pointer, const int64_t* stride, int32_t rows) {
  bool fits = reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && (stride[2] != 0 || rows <= 1);
  for (int i = 0; i < 3; ++i) fits = fits && stride[i] % 8 == 0 && stride[i] >= 0 && stride[i] < int64_t(1) << 39;
  return fits;
}

// The checks that both passes share.
static int check(const FastattnForward& f) {
  constexpr int64_t longest = 1 << 30;  // positions and their sums are 32-bit
  if (!::fastattn_supported(f.dtype, f.head_dim)) {
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
  return FASTATTN_OK;
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
  if (const int status = fastattn::check(f)) return status;
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

int64_t fastattn_backward_rows(const FastattnForward* arguments) {
  return arguments == nullptr ? 0 : 2 * fastattn::padded_rows(*arguments);
}

int fastattn_attention_backward(const FastattnBackward* arguments) {
  using namespace fastattn;
  if (arguments == nullptr) return fail(FASTATTN_BAD_ARGUMENT, "arguments: expected a pointer, got null");
  const FastattnBackward& b = *arguments;
  const FastattnForward& f = b.f;
  if (const int status = check(f)) return status;
  const int64_t of_keys = count_works<PassShape<64, kKeysAndValues>>(f);  // of 128 rows in all passes
  const int64_t of_queries = count_works<PassShape<64, kQueriesAlone>>(f), of_rows = count_row_works(f);
  if (of_keys == 0 && of_queries == 0) return FASTATTN_OK;
  for (const int64_t works : {of_keys, of_queries, of_rows}) {
    if (works > INT32_MAX) {
      return fail(FASTATTN_BAD_ARGUMENT, "expected at most 2^31 - 1 works of a block, got %lld", (long long)works);
    }
  }
  bool fit = reinterpret_cast<uintptr_t>(b.rows) % 16 == 0;
  for (int operand = 0; operand < kOperands; ++operand) {
    const Tensor tensor = tensor_of(b, Operand(operand));
    fit = fit && fits(tensor.base, tensor.stride, of_query(Operand(operand)) ? f.q_len : f.kv_len);
  }
  if (!fit) {
    return fail(FASTATTN_BAD_ARGUMENT, "q, k, v, out, dout, dq, dk, dv, rows: expected rows apart from one another at "
                                       "multiples of 16 bytes, below 2^40 bytes");
  }
  return launch(b);
}
