// The C interface has only pointers and 8-byte numbers, no PyTorch and no Python, so that Python can pack a call into
// bytes. `fastattn/backends/cpu` calls it and lists the fields of each struct in this order.
#pragma once

#include <cstdint>

#ifndef FASTATTN_DIGEST
#define FASTATTN_DIGEST ""  // of the sources; the build passes it
#endif

extern "C" {

// The version of this interface: each change of the declarations below raises it.
#define FASTATTN_CPU_ABI 7

enum FastattnCpuDtype { FASTATTN_FLOAT32 = 0, FASTATTN_FLOAT16 = 1, FASTATTN_BFLOAT16 = 2, FASTATTN_FLOAT64 = 3 };
// For quantised caches only: int8 and float8_e4m3fn.
enum FastattnCacheDtype { FASTATTN_INT8 = 4, FASTATTN_FLOAT8 = 5 };

enum FastattnCpuStatus { FASTATTN_CPU_OK = 0, FASTATTN_CPU_BAD_ARGUMENT = 1, FASTATTN_CPU_NO_MEMORY = 2 };

// An open side of a window. As `q_offset` it aligns the last query with the last key, in each packed sequence.
#define FASTATTN_OPEN INT64_MIN

// A tensor of four dimensions. Strides are in elements, 0 in a dimension that broadcasts.
struct FastattnView {
  void* data;
  int64_t stride[4];
};

// The threads that run a call. `parallel` is the `GOMP_parallel` of the process; if null, the library starts its own
// threads.
struct FastattnTeam {
  int64_t threads;
  void* parallel;
};

// q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), out (B, Hq, Lq, Dv). `statistics` (2, B, Hq, Lq) and `lse`
// (B, Hq, Lq) are contiguous, float, or double for double inputs ("the compute type").
struct FastattnAttention {
  FastattnTeam team;
  FastattnView q, k, v, out;
  void *lse, *statistics;
  int64_t dtype;  // of q, k, v and out
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_dim;
  int64_t left, right, q_offset;
  double scale, softcap, dropout_p;  // softcap 0: none
};

// The other tensors of a call; a null pointer means that there is none.
struct FastattnOperands {
  FastattnView mask;        // one byte per element, 0 or 1
  FastattnView bias;        // of `bias_dtype`
  int64_t bias_dtype;
  int64_t bias_size[4];     // 1 in a dimension that broadcasts
  const void* alibi_slopes; // (B or 1, Hq), compute type
  int64_t slopes_stride;    // of a batch entry, 0 or Hq
  const void* sinks;        // (Hq,), compute type
  const int64_t* q_offset;  // (B,)
  const int64_t* seed;      // one element, with dropout only
  const int64_t* dropout_origin; // of its bits: first batch entry, head, row, step of rows, key, step of keys; or null
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (sequences + 1,)
  const int32_t* seqused_k; // (B,): how many of each entry's keys are used, from its first on; or null
  const int64_t* kv_start;  // (B,): the first key that is used; or null
  int64_t sequences;        // with cu_seqlens, B in the shapes above is this, and q, k, v have one batch entry
  // The tensors of `fastattn.block_mask.BlockTensors`, contiguous.
  const int32_t *query_offsets, *query_entries, *key_offsets, *key_entries, *table;
  const uint8_t* pool;
  int64_t block_batch, block_heads;  // sizes: 1 in a dimension that broadcasts
  // For a forward pass over a KV cache, which has `seqused_k` and no `cu_seqlens_k`: k and v have B batch entries.
  // With a block table (B, kv_len / page_size) they have pages (pages, Hk, page_size, D) instead. Entries with fewer
  // than `least_queries` queries are left out.
  const int32_t* block_table;
  int64_t table_stride, pages, page_size, least_queries;
};

// The tensors that a backward pass reads and writes besides those above. dlse (B, Hq, Lq) is contiguous. dbias has
// `bias_size`, dalibi_slopes the shape of the slopes, and dsinks (Hq,): all contiguous, in the compute type. Null means
// not given or not wanted.
struct FastattnGradients {
  FastattnView dout;
  const void* dlse;
  FastattnView dq, dk, dv;
  void *dbias, *dalibi_slopes, *dsinks;
};

// A mask, one byte per element, 0 or 1, and a bias: (B, Hq, Lq, columns), each with its own number of columns. The
// first column belongs to key mask_start[b], or to key 0 if mask_start is null. Keys without a column are allowed and
// get no bias.
struct FastattnScoreTerms {
  FastattnView mask, bias;     // data null: there is none
  int64_t mask_columns, bias_columns, bias_dtype;
  const int64_t* mask_start;   // (B,)
};

// A cache of FastattnCacheDtype and the scales that multiply its numbers, float (pages, slots, Hk).
struct FastattnQuantised {
  int64_t cache_dtype;
  FastattnView k_scale, v_scale;  // the last stride is not read
  int64_t dtype;                  // of new rows
  int64_t k_measured, v_measured; // 1: an append measures the scales and writes them; 0: it uses the stored ones
};

// Attention of few queries to a KV cache. q (B, Hq, Lq, D), out (B, Hq, Lq, Dv). The caches are (B, Lmax, Hk, D), or
// (pages, page_size, Hk, D) with a `block_table` (B, max_pages); their strides are of page, slot, head and column.
// Batch entry b has lens[b] + added keys, clamped to 0 .. capacity, and its last query has the position of the last
// one.
struct FastattnDecode {
  FastattnTeam team;
  FastattnView q, k_cache, v_cache, out;
  void* lse;                   // (B, Hq, Lq), contiguous, compute type
  const int64_t* lens;         // (B,)
  const int32_t* block_table;
  int64_t table_stride;        // between rows of the table
  const void* alibi_slopes;    // (B or 1, Hq), compute type
  int64_t slopes_stride;
  const void* sinks;           // (Hq,), compute type
  int64_t dtype;
  int64_t batch, q_heads, kv_heads, q_len, head_dim, v_dim;
  int64_t pages, page_size, capacity;  // page_size 0: contiguous; capacity in positions per batch entry
  int64_t added, left, right;
  double scale, softcap;
  // (B + 1,): the rows of each entry in q, out and lse, which then have one batch entry with q_len rows. Null: each
  // entry has q_len rows.
  const int32_t* cu_seqlens_q;
  int64_t most_queries;        // packed entries with more are left out
  const FastattnScoreTerms* terms;     // or null; none with cu_seqlens_q
  const FastattnQuantised* quantised;  // or null: the caches have the dtype of q
  const int64_t* kv_start;     // (B,): the first key of each entry that is used; or null
};

// Writes new rows k (B, Hk, L, D) and v (B, Hk, L, Dv) into the caches, from position lens[b] on. Rows without a place
// are left out. With `cu_seqlens_q` (B + 1,) k and v have one batch entry with L rows, and it gives the rows of each
// entry.
struct FastattnAppend {
  FastattnTeam team;
  FastattnView k, v, k_cache, v_cache;
  const int64_t* lens;
  const int32_t* block_table;
  int64_t table_stride;
  int64_t element_size;
  int64_t batch, kv_heads, new_len, head_dim, v_dim;
  int64_t pages, page_size, capacity;
  const int32_t* cu_seqlens_q;
  const FastattnQuantised* quantised;  // or null: the caches have the dtype of k and v, whose element_size this is
};

// The other operations of a step of generation, for few rows. All tensors but tables have `dtype`, which is not
// FASTATTN_FLOAT64. Elements of a row are adjacent, and rows are `stride` elements apart.

// y = x W^T + b for up to three matrices W (columns, width). Their results are adjacent in y (rows, columns of all).
struct FastattnLinear {
  FastattnTeam team;
  const void* x;             // (rows, width)
  int64_t x_stride;
  const void* weight[3];
  int64_t weight_stride[3];
  const void* bias[3];       // (columns,), or null
  int64_t columns[3];        // 0: no such matrix
  void* y;
  int64_t y_stride;
  int64_t dtype, rows, width;
  int64_t gated;             // 1: y = silu(x W0^T + b0) * (x W1^T + b1), of two matrices of one size
  int64_t add;               // 1: the result is added to y
};

// y = x / sqrt(mean(x^2) + eps) * weight over each of the adjacent heads of a row; y may be x.
struct FastattnNorm {
  const void* x;             // (rows, heads, width)
  int64_t x_stride;
  const void* weight;        // (width,), or null
  void* y;
  int64_t y_stride;
  int64_t dtype, rows, heads, width;
  double eps;
};

// Rotary positions: of the first `rotated` numbers of a head, i rotates with i + rotated / 2, or 2 i with 2 i + 1; y may
// be x. The other numbers stay.
struct FastattnRotate {
  FastattnTeam team;
  const void* x;             // (rows, heads, head_dim)
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  const float *cos, *sin;    // (positions, rotated / 2), contiguous
  const int64_t* position;   // (rows,), clamped to 0 .. positions - 1; null: row r has position r % positions
  int64_t positions;
  int64_t dtype, rows, heads, head_dim;
  int64_t back;              // 1: the inverse rotation, which is the derivative
  int64_t rotated;
  int64_t interleaved;       // 1: 2 i rotates with 2 i + 1
};

// y = x / (1 - p) for the elements that are kept, else 0. The element at (row, column) is kept if attention's dropout
// keeps query `row` and key `column` of the first head. x and y (rows, width) are contiguous.
struct FastattnDropout {
  FastattnTeam team;
  const void* x;
  void* y;
  int64_t seed, dtype, rows, width;
  double p;                  // below 1
};

// y = x / sqrt(mean(x^2) + eps) * weight for each row. With dweight it computes gradients: y is then that of x.
// x, y and dy (rows, width), weight and dweight (width,), all contiguous.
struct FastattnRmsNorm {
  FastattnTeam team;
  const void *x, *weight;
  const void* dy;            // null without dweight
  void *y, *dweight;         // dweight may be null
  int64_t dtype, rows, width;
  double eps;
};

// y = silu(gate) * up. With dup it computes gradients: y is then that of gate. All (rows, width), contiguous.
struct FastattnGate {
  FastattnTeam team;
  const void *gate, *up;
  const void* dy;            // null without dup
  void *y, *dup;             // dup may be null
  int64_t dtype, rows, width;
};

enum FastattnCallKind {
  FASTATTN_CALL_APPEND = 0,
  FASTATTN_CALL_DECODE = 1,
  FASTATTN_CALL_LINEAR = 2,
  FASTATTN_CALL_NORM = 3,
  FASTATTN_CALL_ROTATE = 4
};

// One of several calls: its kind and its struct.
struct FastattnCall {
  int64_t kind;
  const void* arguments;
};

#if defined(_WIN32)
#define FASTATTN_EXPORT __declspec(dllexport)
#else
#define FASTATTN_EXPORT __attribute__((visibility("default")))
#endif

FASTATTN_EXPORT int fastattn_cpu_abi();
FASTATTN_EXPORT const char* fastattn_cpu_digest();
FASTATTN_EXPORT const char* fastattn_cpu_last_error();  // the last error of this thread
FASTATTN_EXPORT const char* fastattn_cpu_variant();     // the name of the instruction set in use
FASTATTN_EXPORT int fastattn_cpu_use_variant(const char* name);  // for tests: 1 if this processor has it
// `operands` may be null if there are none.
FASTATTN_EXPORT int fastattn_cpu_forward(const FastattnAttention* attention, const FastattnOperands* operands);
FASTATTN_EXPORT int fastattn_cpu_backward(
    const FastattnAttention* attention, const FastattnOperands* operands, const FastattnGradients* gradients);
FASTATTN_EXPORT int fastattn_cpu_decode(const FastattnDecode* decode);
FASTATTN_EXPORT int fastattn_cpu_append(const FastattnAppend* append);
FASTATTN_EXPORT int fastattn_cpu_linear(const FastattnLinear* linear);
FASTATTN_EXPORT int fastattn_cpu_norm(const FastattnNorm* norm);
FASTATTN_EXPORT int fastattn_cpu_rotate(const FastattnRotate* rotate);
FASTATTN_EXPORT int fastattn_cpu_dropout(const FastattnDropout* dropout);
FASTATTN_EXPORT int fastattn_cpu_rms_norm(const FastattnRmsNorm* norm);
FASTATTN_EXPORT int fastattn_cpu_gate(const FastattnGate* gate);
// Runs calls one after another, up to the first that fails.
FASTATTN_EXPORT int fastattn_cpu_run(const FastattnCall* calls, int64_t count);
}
