// Checks of the exported functions' arguments, before any memory is touched.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "interface.h"

namespace fastattn::cpu {
namespace {

constexpr int64_t kFar = int64_t(1) << 30;  // engines have 32-bit positions: two of them plus a length still fit
constexpr int64_t kWidest = 1 << 16;        // head dims
constexpr int64_t kMostThreads = 1024;

using ErrorText = char[256];

// Remembers the first thing that is wrong.
class Checks {
 public:
  explicit Checks(ErrorText& text) : text_(text) {}

  bool good() const { return good_; }

  __attribute__((format(printf, 3, 4))) void expect(bool condition, const char* format, ...) {
    if (condition || !good_) return;
    good_ = false;
    va_list values;
    va_start(values, format);
    std::vsnprintf(text_, sizeof text_, format, values);
    va_end(values);
  }

  void size(const char* name, int64_t value, int64_t least, int64_t most) {
    expect(value >= least && value <= most, "%s: expected %lld to %lld, got %lld", name, (long long)least,
           (long long)most, (long long)value);
  }

  // The number of elements of a tensor, a product of sizes: its bytes must be countable.
  void count(const char* name, int64_t a, int64_t b, int64_t c, int64_t d) {
    int64_t n = 0;
    const bool fits = good_ && !__builtin_mul_overflow(a, b, &n) && !__builtin_mul_overflow(n, c, &n) &&
                      !__builtin_mul_overflow(n, d, &n) && n <= INT64_MAX / 16;
    expect(fits, "%s: expected fewer than 2^59 elements", name);
    elements_ = fits ? n : 0;
  }

  void pointer(const char* name, const void* data) {
    expect(data != nullptr || elements_ == 0, "%s: expected a pointer, got null", name);
  }

  void view(const char* name, const FastattnView& view, int64_t a, int64_t b, int64_t c, int64_t d) {
    count(name, a, b, c, d);
    pointer(name, view.data);
  }

  void offset(const char* name, int64_t value) {
    if (value != FASTATTN_OPEN) size(name, value, -kFar, kFar);
  }

  void heads(int64_t q_heads, int64_t kv_heads) {
    size("kv_heads", kv_heads, 1, kFar);
    size("q_heads", q_heads, 1, kFar);
    expect(good_ && q_heads % kv_heads == 0, "q_heads: expected a multiple of kv_heads == %lld, got %lld",
           (long long)kv_heads, (long long)q_heads);
  }

  // The starts of sequences, which must rise from 0 or more to at most `total`.
  void bounds(const char* name, const int32_t* values, int64_t sequences, int64_t total) {
    for (int64_t i = 0; good_ && i <= sequences; i++) {
      size(name, values[i], i == 0 ? 0 : values[i - 1], total);
    }
  }

 private:
  ErrorText& text_;
  bool good_ = true;
  int64_t elements_ = 0;
};

inline void check_team(Checks& checks, const FastattnTeam& team) { checks.size("threads", team.threads, 1, kMostThreads); }

inline void check_attention(Checks& checks, const FastattnAttention& a) {
  check_team(checks, a.team);
  checks.size("dtype", a.dtype, FASTATTN_FLOAT32, FASTATTN_FLOAT64);
  checks.size("batch", a.batch, 0, kFar);
  checks.heads(a.q_heads, a.kv_heads);
  checks.size("q_len", a.q_len, 0, kFar);
  checks.size("kv_len", a.kv_len, 0, kFar);
  checks.size("head_dim", a.head_dim, 1, kWidest);
  checks.size("v_dim", a.v_dim, 1, kWidest);
  checks.offset("left", a.left);
  checks.offset("right", a.right);
  checks.offset("q_offset", a.q_offset);
  checks.expect(a.softcap >= 0.0, "softcap: expected 0 (none) or more, got %g", a.softcap);
  checks.expect(a.dropout_p >= 0.0 && a.dropout_p <= 1.0, "dropout_p: expected 0 to 1, got %g", a.dropout_p);
  checks.view("q", a.q, a.batch, a.q_heads, a.q_len, a.head_dim);
  checks.view("k", a.k, a.batch, a.kv_heads, a.kv_len, a.head_dim);
  checks.view("v", a.v, a.batch, a.kv_heads, a.kv_len, a.v_dim);
  checks.view("out", a.out, a.batch, a.q_heads, a.q_len, a.v_dim);
  checks.count("statistics", a.batch, a.q_heads, a.q_len, 2);
  checks.pointer("lse", a.lse);
  checks.pointer("statistics", a.statistics);
}

inline void check_operands(Checks& checks, const FastattnAttention& a, const FastattnOperands& o) {
  const bool packed = o.cu_seqlens_q != nullptr || o.cu_seqlens_k != nullptr;
  const int64_t entries = packed ? o.sequences : a.batch;
  const bool cached = o.seqused_k != nullptr && o.cu_seqlens_k == nullptr;
  checks.expect(packed || cached || a.q_offset != FASTATTN_OPEN || o.q_offset != nullptr,
                "q_offset: expected a number without packed sequences");
  checks.expect(a.dropout_p == 0.0 || o.seed != nullptr, "seed: expected one with dropout, got null");
  if (packed) {
    checks.expect(o.cu_seqlens_q != nullptr && (o.cu_seqlens_k != nullptr || cached),
                  "cu_seqlens: expected both or neither");
    checks.size("batch", a.batch, 1, 1);
    checks.size("sequences", o.sequences, 1, kFar);
    checks.bounds("cu_seqlens_q", o.cu_seqlens_q, o.sequences, a.q_len);
    if (!cached) checks.bounds("cu_seqlens_k", o.cu_seqlens_k, o.sequences, a.kv_len);
  }
  if (packed || cached) {
    checks.expect(o.mask.data == nullptr && o.bias.data == nullptr && o.table == nullptr,
                  "mask, bias, block_mask: expected none with packed sequences or a cache");
  }
  checks.expect(o.block_table == nullptr || cached, "block_table: expected none without seqused_k");
  if (o.block_table != nullptr) {
    checks.size("page_size", o.page_size, 1, kFar);
    checks.size("pages", o.pages, a.kv_len > 0 ? 1 : 0, kFar);
  }
  checks.count("scores operands", entries, a.q_heads, 1, 1);
  if (o.bias.data != nullptr) {
    checks.size("bias_dtype", o.bias_dtype, FASTATTN_FLOAT32, FASTATTN_FLOAT64);
    const int64_t full[] = {a.batch, a.q_heads, a.q_len, a.kv_len};
    for (int dim = 0; dim < 4; dim++) {
      checks.expect(o.bias_size[dim] == 1 || o.bias_size[dim] == full[dim],
                    "bias_size[%d]: expected 1 or %lld, got %lld", dim, (long long)full[dim],
                    (long long)o.bias_size[dim]);
    }
  }
  checks.expect(o.slopes_stride == 0 || o.slopes_stride == a.q_heads, "slopes_stride: expected 0 or %lld, got %lld",
                (long long)a.q_heads, (long long)o.slopes_stride);
  if (o.table != nullptr || o.pool != nullptr) {
    // Tensors without elements have no address: the entries of a mask that is empty, all but the pool without rows or keys.
    const bool tiles = a.q_len > 0 && a.kv_len > 0 && a.batch > 0 && a.q_heads > 0;
    checks.expect(o.pool != nullptr && (!tiles || (o.table != nullptr && o.query_offsets != nullptr &&
                                                   o.key_offsets != nullptr)),
                  "block_mask: expected its table, offsets and pool, or none of them");
    checks.expect(o.block_batch == 1 || o.block_batch == a.batch, "block_batch: expected 1 or %lld, got %lld",
                  (long long)a.batch, (long long)o.block_batch);
    checks.expect(o.block_heads == 1 || o.block_heads == a.q_heads, "block_heads: expected 1 or %lld, got %lld",
                  (long long)a.q_heads, (long long)o.block_heads);
  }
}

inline void check_gradients(Checks& checks, const FastattnAttention& a, const FastattnOperands& o, const FastattnGradients& g) {
  checks.expect(o.seqused_k == nullptr || o.cu_seqlens_k != nullptr, "seqused_k: expected cu_seqlens_k in a backward pass");
  checks.view("dout", g.dout, a.batch, a.q_heads, a.q_len, a.v_dim);
  checks.view("dq", g.dq, a.batch, a.q_heads, a.q_len, a.head_dim);
  checks.view("dk", g.dk, a.batch, a.kv_heads, a.kv_len, a.head_dim);
  checks.view("dv", g.dv, a.batch, a.kv_heads, a.kv_len, a.v_dim);
  checks.expect(g.dbias == nullptr || o.bias.data != nullptr, "dbias: expected a bias");
  checks.expect(g.dalibi_slopes == nullptr || o.alibi_slopes != nullptr, "dalibi_slopes: expected slopes");
  checks.expect(g.dsinks == nullptr || o.sinks != nullptr, "dsinks: expected sinks");
}

template <class Cache>
void check_cache(Checks& checks, const Cache& c) {
  check_team(checks, c.team);
  checks.size("batch", c.batch, 0, kFar);
  checks.size("kv_heads", c.kv_heads, 1, kFar);
  checks.size("head_dim", c.head_dim, 1, kWidest);
  checks.size("v_dim", c.v_dim, 1, kWidest);
  checks.size("pages", c.pages, 0, kFar);
  checks.size("page_size", c.page_size, 0, kFar);
  checks.size("capacity", c.capacity, 0, kFar);
  checks.expect((c.block_table == nullptr) == (c.page_size == 0), "block_table: expected one where page_size is not 0");
  checks.expect(c.page_size != 0 || c.pages == c.batch, "pages: expected batch == %lld without a block_table, got %lld",
                (long long)c.batch, (long long)c.pages);
  checks.expect(c.page_size == 0 || (checks.good() && c.capacity % c.page_size == 0),
                "capacity: expected whole pages of %lld, got %lld", (long long)c.page_size, (long long)c.capacity);
  const int64_t slots = c.page_size == 0 ? c.capacity : c.page_size;
  checks.view("k_cache", c.k_cache, c.pages, slots, c.kv_heads, c.head_dim);
  checks.view("v_cache", c.v_cache, c.pages, slots, c.kv_heads, c.v_dim);
  checks.count("lens", c.batch, 1, 1, 1);
  checks.pointer("lens", c.lens);
}

template <class Cache>
void check_quantised(Checks& checks, const Cache& c) {
  if (c.quantised == nullptr || !checks.good()) return;
  const FastattnQuantised& quantised = *c.quantised;
  checks.size("cache_dtype", quantised.cache_dtype, FASTATTN_INT8, FASTATTN_FLOAT8);
  const int64_t slots = c.page_size == 0 ? c.capacity : c.page_size;
  checks.view("k_scale", quantised.k_scale, c.pages, slots, c.kv_heads, 1);
  checks.view("v_scale", quantised.v_scale, c.pages, slots, c.kv_heads, 1);
}

inline void check_terms(Checks& checks, const FastattnDecode& d) {
  if (d.terms == nullptr || !checks.good()) return;
  checks.expect(d.cu_seqlens_q == nullptr, "mask, bias: expected none with cu_seqlens_q");
  checks.size("mask_columns", d.terms->mask_columns, 0, kFar);
  checks.size("bias_columns", d.terms->bias_columns, 0, kFar);
  checks.size("bias_dtype", d.terms->bias_dtype, FASTATTN_FLOAT32, FASTATTN_FLOAT64);
}

inline void check_decode(Checks& checks, const FastattnDecode& d) {
  checks.heads(d.q_heads, d.kv_heads);
  check_cache(checks, d);
  checks.size("dtype", d.dtype, FASTATTN_FLOAT32, FASTATTN_FLOAT64);
  checks.size("q_len", d.q_len, 0, kFar);
  checks.size("added", d.added, 0, kFar);
  checks.offset("left", d.left);
  checks.offset("right", d.right);
  checks.expect(d.softcap >= 0.0, "softcap: expected 0 (none) or more, got %g", d.softcap);
  checks.expect(d.slopes_stride == 0 || d.slopes_stride == d.q_heads, "slopes_stride: expected 0 or %lld, got %lld",
                (long long)d.q_heads, (long long)d.slopes_stride);
  const int64_t q_batch = d.cu_seqlens_q == nullptr ? d.batch : 1;
  if (d.cu_seqlens_q != nullptr) checks.bounds("cu_seqlens_q", d.cu_seqlens_q, d.batch, d.q_len);
  checks.view("q", d.q, q_batch, d.q_heads, d.q_len, d.head_dim);
  checks.view("out", d.out, q_batch, d.q_heads, d.q_len, d.v_dim);
  checks.pointer("lse", d.lse);
  checks.expect(d.quantised == nullptr || d.dtype != FASTATTN_FLOAT64, "dtype: expected no double over a quantised cache");
  check_quantised(checks, d);
  check_terms(checks, d);
}

inline void check_half_or_float(Checks& checks, int64_t dtype) { checks.size("dtype", dtype, FASTATTN_FLOAT32, FASTATTN_BFLOAT16); }

inline void check_append(Checks& checks, const FastattnAppend& a) {
  check_cache(checks, a);
  checks.size("new_len", a.new_len, 0, kFar);
  checks.expect(a.element_size == 2 || a.element_size == 4 || a.element_size == 8,
                "element_size: expected 2, 4 or 8, got %lld", (long long)a.element_size);
  const int64_t batch = a.cu_seqlens_q == nullptr ? a.batch : 1;
  if (a.cu_seqlens_q != nullptr) checks.bounds("cu_seqlens_q", a.cu_seqlens_q, a.batch, a.new_len);
  checks.view("k", a.k, batch, a.kv_heads, a.new_len, a.head_dim);
  checks.view("v", a.v, batch, a.kv_heads, a.new_len, a.v_dim);
  check_quantised(checks, a);
  if (a.quantised != nullptr && checks.good()) check_half_or_float(checks, a.quantised->dtype);
}

inline void check_linear(Checks& checks, const FastattnLinear& l) {
  check_team(checks, l.team);
  check_half_or_float(checks, l.dtype);
  checks.size("rows", l.rows, 0, kFar);
  checks.size("width", l.width, 1, kFar);
  checks.size("gated", l.gated, 0, 1);
  checks.size("add", l.add, 0, 1);
  int64_t columns = 0;
  for (int i = 0; i < 3; i++) {
    checks.size("columns", l.columns[i], 0, kFar);
    checks.count("weight", l.columns[i], l.width, 1, 1);
    checks.pointer("weight", l.weight[i]);
    columns += l.columns[i];
  }
  checks.expect(!l.gated || (l.columns[0] == l.columns[1] && l.columns[2] == 0),
                "columns: expected two matrices of one size where gated");
  checks.count("x", l.rows, l.width, 1, 1);
  checks.pointer("x", l.x);
  checks.count("y", l.rows, columns, 1, 1);
  checks.pointer("y", l.y);
}

inline void check_norm(Checks& checks, const FastattnNorm& n) {
  check_half_or_float(checks, n.dtype);
  checks.size("rows", n.rows, 0, kFar);
  checks.size("heads", n.heads, 0, kFar);
  checks.size("width", n.width, 1, kFar);
  checks.count("x", n.rows, n.heads, n.width, 1);
  checks.pointer("x", n.x);
  checks.pointer("y", n.y);
}

inline void check_rotate(Checks& checks, const FastattnRotate& o) {
  check_team(checks, o.team);
  check_half_or_float(checks, o.dtype);
  checks.size("rows", o.rows, 0, kFar);
  checks.size("heads", o.heads, 0, kFar);
  checks.size("head_dim", o.head_dim, 1, kWidest);
  checks.size("rotated", o.rotated, 0, o.head_dim);
  checks.expect(o.rotated % 2 == 0, "rotated: expected an even number, got %lld", (long long)o.rotated);
  checks.size("positions", o.positions, 1, kFar);
  checks.count("x", o.rows, o.heads, o.head_dim, 1);
  checks.pointer("x", o.x);
  checks.pointer("y", o.y);
  checks.pointer("cos", o.cos);
  checks.pointer("sin", o.sin);
}

inline void check_dropout(Checks& checks, const FastattnDropout& d) {
  check_team(checks, d.team);
  check_half_or_float(checks, d.dtype);
  checks.size("rows", d.rows, 0, kFar);
  checks.size("width", d.width, 1, kFar);
  checks.expect(d.p >= 0.0 && d.p < 1.0, "p: expected 0 or more and less than 1, got %g", d.p);
  checks.count("x", d.rows, d.width, 1, 1);
  checks.pointer("x", d.x);
  checks.pointer("y", d.y);
}

inline void check_rms_norm(Checks& checks, const FastattnRmsNorm& n) {
  check_team(checks, n.team);
  check_half_or_float(checks, n.dtype);
  checks.size("rows", n.rows, 0, kFar);
  checks.size("width", n.width, 1, kFar);
  checks.count("x", n.rows, n.width, 1, 1);
  checks.pointer("x", n.x);
  checks.pointer("weight", n.weight);
  checks.pointer("y", n.y);
  if (n.dweight != nullptr) checks.pointer("dy", n.dy);
}

inline void check_gate(Checks& checks, const FastattnGate& g) {
  check_team(checks, g.team);
  check_half_or_float(checks, g.dtype);
  checks.size("rows", g.rows, 0, kFar);
  checks.size("width", g.width, 1, kFar);
  checks.count("y", g.rows, g.width, 1, 1);
  checks.pointer("gate", g.gate);
  checks.pointer("up", g.up);
  checks.pointer("y", g.y);
  if (g.dup != nullptr) checks.pointer("dy", g.dy);
}

}  // namespace
}  // namespace fastattn::cpu
