// The exported functions check their arguments before any memory is touched, then call the engine of this processor.
#include <atomic>
#include <cstdio>
#include <cstring>

#include "append.h"
#include "checks.h"
#include "interface.h"
#include "threads.h"
#include "variant.h"

namespace fastattn::cpu {
namespace {

thread_local ErrorText error_text = "";

// -- Which engine ----------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(FASTATTN_ONE_ENGINE)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool always() { return true; }

struct Engine {
  const char* name;
  bool (*supported)();
  bool (*forward)(const FastattnAttention&, const FastattnOperands&, const Team&);
  bool (*backward)(const FastattnAttention&, const FastattnOperands&, const FastattnGradients&, const Team&);
  bool (*decode)(const FastattnDecode&, const Team&);
  bool (*linear)(const FastattnLinear&, const Team&);
  void (*normalise)(const FastattnNorm&);
  bool (*rotate)(const FastattnRotate&, const Team&);
  void (*append)(const FastattnAppend&);
  bool (*dropout)(const FastattnDropout&, const Team&);
  bool (*rms_norm)(const FastattnRmsNorm&, const Team&);
  bool (*gate)(const FastattnGate&, const Team&);
};

#define OF_ROWS(NAME) \
  NAME::linear, NAME::normalise, NAME::rotate, NAME::append_quantised, NAME::dropout, NAME::rms_norm, NAME::gate
#define ENGINE(NAME, SUPPORTED) {#NAME, SUPPORTED, NAME::forward, NAME::backward, NAME::decode, OF_ROWS(NAME)}

// The best one first.
const Engine kEngines[] = {
#if defined(__x86_64__) && !defined(FASTATTN_ONE_ENGINE)
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::forward, avx512_bf16::backward, avx512_bf16::decode, OF_ROWS(avx512)},
    ENGINE(avx512, has_avx512),
    ENGINE(avx2, has_avx2),
#endif
    ENGINE(baseline, always),
#if defined(FASTATTN_TEST_VARIANTS)
    ENGINE(wide, has_avx2),  // used by name only: an engine before it always serves
#endif
};

const Engine* best() {
  const Engine* engine = kEngines;
  while (!engine->supported()) engine++;
  return engine;
}

std::atomic<const Engine*> chosen{nullptr};

const Engine& engine() {
  const Engine* current = chosen.load(std::memory_order_relaxed);
  if (current == nullptr) chosen.store(current = best(), std::memory_order_relaxed);
  return *current;
}

// -- Calls -----------------------------------------------------------------------------------------------------------

const FastattnOperands kNoOperands{};

// A team of as many threads as the work is worth: waking one takes some microseconds.
Team team_for(const FastattnTeam& team, double operations) {
  constexpr double kGrain = 1 << 19;
  const double useful = 1.0 + operations / kGrain;
  return {useful < double(team.threads) ? int64_t(useful) : team.threads, team.parallel};
}

double operations(const FastattnAttention& a) {
  return 2.0 * double(a.batch) * double(a.q_heads) * double(a.q_len) * double(a.kv_len) * double(a.head_dim + a.v_dim);
}

int status(bool had_memory) {
  if (had_memory) return FASTATTN_CPU_OK;
  std::snprintf(error_text, sizeof error_text, "out of memory");
  return FASTATTN_CPU_NO_MEMORY;
}

int missing(const char* name) {
  std::snprintf(error_text, sizeof error_text, "%s: expected a pointer, got null", name);
  return FASTATTN_CPU_BAD_ARGUMENT;
}

// Asks for large pages for a result (B, heads, rows, width), unless other tensors' memory lies between its rows.
void expect_result(const FastattnView& x, int64_t dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  const int64_t size[] = {batch, heads, rows, width};
  uint64_t count = 1, last = 0;
  for (int dim = 0; dim < 4; dim++) {
    count *= uint64_t(size[dim]);
    last += uint64_t(size[dim] - 1) * uint64_t(x.stride[dim]);
  }
  if (count > 0 && last == count - 1) ask_for_large_pages(x.data, size_t(count) * size_t(element_bytes(dtype)));
}

}  // namespace
}  // namespace fastattn::cpu

using namespace fastattn::cpu;

int fastattn_cpu_abi() { return FASTATTN_CPU_ABI; }

const char* fastattn_cpu_digest() { return FASTATTN_DIGEST; }

const char* fastattn_cpu_last_error() { return error_text; }

const char* fastattn_cpu_variant() { return engine().name; }

int fastattn_cpu_use_variant(const char* name) {
  for (const Engine& candidate : kEngines) {
    if (std::strcmp(candidate.name, name) != 0 || !candidate.supported()) continue;
    chosen.store(&candidate, std::memory_order_relaxed);
    return 1;
  }
  return 0;
}

int fastattn_cpu_forward(const FastattnAttention* attention, const FastattnOperands* operands) {
  if (attention == nullptr) return missing("attention");
  const FastattnOperands& o = operands == nullptr ? kNoOperands : *operands;
  Checks checks(error_text);
  check_attention(checks, *attention);
  check_operands(checks, *attention, o);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  const FastattnAttention& a = *attention;
  expect_result(a.out, a.dtype, a.batch, a.q_heads, a.q_len, a.v_dim);
  return status(engine().forward(*attention, o, team_for(attention->team, operations(*attention))));
}

int fastattn_cpu_backward(
    const FastattnAttention* attention, const FastattnOperands* operands, const FastattnGradients* gradients) {
  if (attention == nullptr) return missing("attention");
  if (gradients == nullptr) return missing("gradients");
  const FastattnOperands& o = operands == nullptr ? kNoOperands : *operands;
  Checks checks(error_text);
  check_attention(checks, *attention);
  check_operands(checks, *attention, o);
  check_gradients(checks, *attention, o, *gradients);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  const FastattnAttention& a = *attention;
  const FastattnGradients& g = *gradients;
  expect_result(g.dq, a.dtype, a.batch, a.q_heads, a.q_len, a.head_dim);
  expect_result(g.dk, a.dtype, a.batch, a.kv_heads, a.kv_len, a.head_dim);
  expect_result(g.dv, a.dtype, a.batch, a.kv_heads, a.kv_len, a.v_dim);
  if (g.dbias != nullptr) {
    const int64_t* size = o.bias_size;
    const FastattnView dbias{g.dbias, {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1}};
    expect_result(dbias, a.dtype == FASTATTN_FLOAT64 ? FASTATTN_FLOAT64 : FASTATTN_FLOAT32, size[0], size[1], size[2], size[3]);
  }
  return status(engine().backward(*attention, o, *gradients, team_for(attention->team, 2.5 * operations(*attention))));
}

int fastattn_cpu_decode(const FastattnDecode* decode) {
  if (decode == nullptr) return missing("decode");
  Checks checks(error_text);
  check_decode(checks, *decode);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  const FastattnDecode& d = *decode;
  if (d.batch == 0 || d.q_len == 0) return FASTATTN_CPU_OK;
  // Memory bounds the speed, so a key takes somewhat longer than its operations.
  const double work = 8.0 * double(d.cu_seqlens_q == nullptr ? d.batch : 1) * double(d.q_heads) * double(d.q_len) * double(d.capacity) *
                      double(d.head_dim + d.v_dim);
  return status(engine().decode(d, team_for(d.team, work)));
}

int fastattn_cpu_append(const FastattnAppend* append) {
  if (append == nullptr) return missing("append");
  Checks checks(error_text);
  check_append(checks, *append);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  if (append->batch == 0 || append->new_len == 0) return FASTATTN_CPU_OK;
  if (append->quantised == nullptr) append_rows(*append);
  else engine().append(*append);
  return FASTATTN_CPU_OK;
}

int fastattn_cpu_linear(const FastattnLinear* linear) {
  if (linear == nullptr) return missing("linear");
  Checks checks(error_text);
  check_linear(checks, *linear);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  if (linear->rows == 0) return FASTATTN_CPU_OK;
  const int64_t* columns = linear->columns;
  // Memory bounds products of few rows: an element of W takes a few operations more than its products.
  const double work = double(columns[0] + columns[1] + columns[2]) * double(linear->width) * (8.0 + 2.0 * double(linear->rows));
  return status(engine().linear(*linear, team_for(linear->team, work)));
}

int fastattn_cpu_norm(const FastattnNorm* norm) {
  if (norm == nullptr) return missing("norm");
  Checks checks(error_text);
  check_norm(checks, *norm);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  engine().normalise(*norm);
  return FASTATTN_CPU_OK;
}

int fastattn_cpu_rotate(const FastattnRotate* rotate) {
  if (rotate == nullptr) return missing("rotate");
  Checks checks(error_text);
  check_rotate(checks, *rotate);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  constexpr double kWork = 8.0;  // of an element
  const double elements = double(rotate->rows) * double(rotate->heads) * double(rotate->head_dim);
  return status(engine().rotate(*rotate, team_for(rotate->team, kWork * elements)));
}

int fastattn_cpu_dropout(const FastattnDropout* dropout) {
  if (dropout == nullptr) return missing("dropout");
  Checks checks(error_text);
  check_dropout(checks, *dropout);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  constexpr double kWork = 16.0;  // of an element
  return status(engine().dropout(*dropout, team_for(dropout->team, kWork * double(dropout->rows) * double(dropout->width))));
}

int fastattn_cpu_rms_norm(const FastattnRmsNorm* norm) {
  if (norm == nullptr) return missing("norm");
  Checks checks(error_text);
  check_rms_norm(checks, *norm);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  constexpr double kWork = 8.0;  // of an element
  return status(engine().rms_norm(*norm, team_for(norm->team, kWork * double(norm->rows) * double(norm->width))));
}

int fastattn_cpu_gate(const FastattnGate* gate) {
  if (gate == nullptr) return missing("gate");
  Checks checks(error_text);
  check_gate(checks, *gate);
  if (!checks.good()) return FASTATTN_CPU_BAD_ARGUMENT;
  constexpr double kWork = 32.0;  // of an element
  return status(engine().gate(*gate, team_for(gate->team, kWork * double(gate->rows) * double(gate->width))));
}

int fastattn_cpu_run(const FastattnCall* calls, int64_t count) {
  if (calls == nullptr) return missing("calls");
  for (int64_t i = 0; i < count; i++) {
    const void* arguments = calls[i].arguments;
    int result = FASTATTN_CPU_BAD_ARGUMENT;
    switch (calls[i].kind) {
      case FASTATTN_CALL_APPEND: result = fastattn_cpu_append(static_cast<const FastattnAppend*>(arguments)); break;
      case FASTATTN_CALL_DECODE: result = fastattn_cpu_decode(static_cast<const FastattnDecode*>(arguments)); break;
      case FASTATTN_CALL_LINEAR: result = fastattn_cpu_linear(static_cast<const FastattnLinear*>(arguments)); break;
      case FASTATTN_CALL_NORM: result = fastattn_cpu_norm(static_cast<const FastattnNorm*>(arguments)); break;
      case FASTATTN_CALL_ROTATE: result = fastattn_cpu_rotate(static_cast<const FastattnRotate*>(arguments)); break;
      default: std::snprintf(error_text, sizeof error_text, "kind: expected 0 to 4, got %lld", (long long)calls[i].kind);
    }
    if (result != FASTATTN_CPU_OK) return result;
  }
  return FASTATTN_CPU_OK;
}
