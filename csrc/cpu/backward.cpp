// Backward attention: probabilities are recomputed from the statistics, never stored (FlashAttention-2, Dao, 2023).
//
// With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse:
// dS = P * (dP - delta), dV = P^T dO, dK = scale * dS^T Q, dQ = scale * dS K, dbias = dS.
//
// A task has one key head of one batch entry: it computes the scores once and shares no sum with other tasks. With few
// heads the keys are divided into pieces, by the sizes alone, and their shares of dQ are added up in their order.
#include "backward_task.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// With fewer tasks than kLeastTasks, keys are divided into pieces of at least kLeastBlocks blocks: each packs all
// queries.
constexpr int64_t kLeastTasks = 16, kLeastBlocks = 4;

// Sums the gradients of slopes and sinks over pieces, and over the batch entries that share them.
template <class T>
void add_learned(const Problem<T>& problem, const FastattnGradients& g, const Results<T>& results) {
  const int64_t heads = problem.a.q_heads, entries = problem.entries();
  T *dslopes = static_cast<T*>(g.dalibi_slopes), *dsinks = static_cast<T*>(g.dsinks);
  const int64_t rows = problem.o.slopes_stride == 0 ? 1 : entries;
  if (dslopes != nullptr) fill(dslopes, rows * heads, T(0));
  if (dsinks != nullptr) fill(dsinks, heads, T(0));
  for (int64_t entry = 0; entry < entries; entry++) {
    for (int64_t head = 0; head < heads; head++) {
      for (int64_t piece = 0; dslopes != nullptr && piece < results.pieces; piece++) {
        dslopes[(rows > 1 ? entry : 0) * heads + head] += results.dslopes[(piece * entries + entry) * heads + head];
      }
      if (dsinks != nullptr) dsinks[head] += results.dsinks[entry * heads + head];
    }
  }
}

template <class T, class Step>
bool backward_as(
    const FastattnAttention& a, const FastattnOperands& o, const FastattnGradients& g, const Team& team) {
  const Problem<T> problem{a, o};
  const int64_t heads = problem.entries() * a.kv_heads, blocks = (a.kv_len + kKeys - 1) / kKeys;
  const bool whole = problem.packed() || g.dbias != nullptr || heads == 0 || heads >= kLeastTasks;
  const int64_t pieces = whole ? 1 : most(1, least(blocks / kLeastBlocks, (kLeastTasks + heads - 1) / heads));
  const int64_t tasks = heads * pieces, all_heads = problem.entries() * a.q_heads;
  const int64_t dq_count = pieces == 1 ? 0 : all_heads * a.q_len * round_up(a.head_dim, kLanes<T>);
  const Shared dq(size_t(dq_count) * sizeof(T)), learned(size_t(all_heads * (pieces + 1)) * sizeof(T));
  const Shared turns(size_t(tasks) * sizeof(int64_t));
  if ((dq_count > 0 && dq.as<T>() == nullptr) || (all_heads > 0 && learned.as<T>() == nullptr) ||
      (tasks > 0 && turns.as<int64_t>() == nullptr)) {
    return false;
  }
  Results<T> results{pieces, pieces == 1 ? nullptr : dq.as<T>(), nullptr, nullptr, nullptr};
  if (g.dalibi_slopes != nullptr) results.dslopes = learned.as<T>();
  if (g.dsinks != nullptr) results.dsinks = learned.as<T>() + all_heads * pieces;
  fill(learned.as<T>(), all_heads * (pieces + 1), T(0));
  const BiasSharing bias(a, o, g);
  if (bias.wanted && !bias.own) fill(static_cast<T*>(g.dbias), bias.elements, T(0));
  if (bias.tasks || pieces > 1) {
    results.turns = turns.as<int64_t>();
    fill(results.turns, tasks, int64_t(-1));
  }
  const bool done = team.run(tasks, [&](int64_t number) {
    const Turns own(results.turns, number, pieces > 1 ? heads : 1);
    const auto task_of = [&](int64_t n) { return Task{n % heads / a.kv_heads, n % a.kv_heads, n / heads}; };
    const int64_t after = number + team.threads();
    const Task next = task_of(after);
    return Backward<T, Step>(problem, g, results, task_of(number), after < tasks ? &next : nullptr, own).run();
  });
  if (!done) return false;
  add_learned(problem, g, results);
  return true;
}

}  // namespace

bool backward(const FastattnAttention& a, const FastattnOperands& o, const FastattnGradients& g, const Team& team) {
#if FASTATTN_DOTS
  if (a.dtype == FASTATTN_BFLOAT16) return backward_as<float, Dot>(a, o, g, team);
#endif
#ifdef FASTATTN_BESIDE
  return FASTATTN_BESIDE::backward(a, o, g, team);
#else
  if (a.dtype == FASTATTN_FLOAT64) return backward_as<double, Multiply<double>>(a, o, g, team);
  return backward_as<float, Multiply<float>>(a, o, g, team);
#endif
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
