// One block of the forward pass, specialised by warp group: one loads, the others compute (Shah et al.,
// FlashAttention-3, 2024, arXiv:2407.08608).
//
// The loader fills stages of keys and values by TMA. A consumer starts two products together: the scores of the next
// tile, and this tile's weights times the values. While the second still runs, it exponentiates the scores. The
// consumers take turns to start products, so that one multiplies while the others exponentiate.
//
// The steps are written once and run on a Machine. On the GPU (attention_forward.cu) each thread is a Machine; the
// tests' model of the GPU (tests/support/hopper) has one for each warp group. A Machine has
//   each(f)                          f on every thread's registers, a Registers<Shape, Array>
//   elected(f)                       f in one thread of the warp group
//   registers<n, more>()             sets the number of registers of a thread
//   init(barrier, count), publish()  in the elected thread: initialises an mbarrier; makes all of them visible to TMA
//   wait(barrier, parity)            waits until the phase with this parity has ended
//   arrive(barrier), release(barrier)  arrives by one thread; by one thread of each of the group's four warps
//   expect(barrier, bytes)           arrives; the phase then ends only after these bytes
//   load(operand, to, column, place, barrier), store(operand, from, column, place)
//                                    moves a box of 64 columns by TMA, with the rows of operand_map; asynchronous. A
//                                    load counts its bytes on the barrier
//   copy(to, from, bytes, barrier)   copies adjacent bytes, the same way
//   stored()                         waits until the elected thread's stores have read their sources
//   put(to, value), get(from, x)     writes 4 bytes to shared memory, reads 16 from it
//   fence()                          makes what this thread wrote there visible to TMA and wgmma
//   sync(id, threads), signal(id, threads)  arrives at a named barrier and waits; arrives only
//   begin(arrays...)                 comes before products that use these arrays of registers
//   scores(to, a, b, add)            to (+)= a b^T, 64 x n x 16, a and b from shared memory
//   values(to, from, k, b)           to += from b, 64 x n x 16, columns 16 k of `from`, both from registers
//   commit()                         ends a group of products, which are asynchronous
//   finish(n, arrays...)             waits until all groups but the last n have ended; these arrays are then free
//   again(x)                         x, such that results from it are computed anew, not kept in registers
//   quad_max(array), quad_sum(array)  over the four threads that share a row
//   exp2(x), log2(x), inverse(x), pack(a, b), shared() (the address of the first tile), block(), blocks(),
//   capped() (whether there is a softcap)
#pragma once

#include <cmath>
#include <type_traits>

#include "schedule.cuh"

namespace fastattn {

constexpr float kInfinity = __builtin_huge_valf();
constexpr std::integral_constant<int, 0> kNone = {};  // groups of products that may still run
constexpr std::integral_constant<int, 1> kOne = {};

// Named barriers; 0 is for the whole block.
constexpr int kEveryone = 0, kTurn = 1, kStaging = kTurn + 3;

enum Held { kScores = 1, kWeights = 2, kOutput = 4, kRowState = 8 };  // names of a consumer's registers, for the model

template <class Shape, template <class, int, int> class Array>
struct Registers {
  int index;  // 0 to 127
  Array<float, Shape::kKeys / 2, kScores> s;       // scores, then weights: fragment of 64 x kKeys
  Array<uint32_t, Shape::kKeys / 4, kWeights> p;   // weights in the inputs' dtype: operand A of kKeys / 16 products
  Array<float, Shape::kDim / 2, kOutput> o;        // fragment of 64 x D
  float peak[2], sum[2];  // running maximum of the unscaled scores and sum of the weights, for rows r and r + 8
  float maximum[2], correction[2];
  int begin[2], seen[2];  // the first key that the row sees, and how many
};

// Stage and parity of the n-th tile. A barrier's phase n / stages has parity n / stages % 2. The wait for a free stage
// is for the phase before, so the first wait passes at once.
template <class Shape>
FASTATTN_HD constexpr int stage(int n) { return n % Shape::kStages; }
template <class Shape>
FASTATTN_HD constexpr int full_parity(int n) { return n / Shape::kStages % 2; }
template <class Shape>
FASTATTN_HD constexpr int free_parity(int n) { return 1 - full_parity<Shape>(n); }

template <class Shape, class Machine>
FASTATTN_DEVICE void prepare(Machine& m) {
  m.init(Shape::kFullQueries, 1);
  m.init(Shape::kFreeQueries, Shape::kConsumers);
  for (int s = 0; s < Shape::kStages; ++s) {
    m.init(Shape::full_keys(s), 1);
    m.init(Shape::full_values(s), 1);
    m.init(Shape::free_keys(s), 4 * Shape::kConsumers);
    m.init(Shape::free_values(s), 4 * Shape::kConsumers);
  }
  m.publish();
}

// The loader, one thread. It requests tiles in the order in which they are needed.
template <class Shape, class Machine>
FASTATTN_DEVICE void produce(Machine& m, const Plan& plan) {
  const auto load = [&](Operand operand, uint32_t to, int rows, const Place& place, int barrier) {
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      m.load(operand, m.shared() + to + panel * panel_bytes(rows), panel * 64, place, barrier);
    }
  };
  int n = 0, parity = 1;
  for (int index = m.block(); index < plan.works; index += m.blocks()) {
    const Work work = work_at<Shape>(plan, index);
    if (work.empty()) continue;
    Place key = place_of(plan, kKeys, work, work.extent, work.first_key);
    Place value = place_of(plan, kValues, work, work.extent, work.first_key);
    const auto keys = [&](int n) {
      const int s = stage<Shape>(n);
      m.wait(Shape::free_keys(s), free_parity<Shape>(n));
      m.expect(Shape::full_keys(s), Shape::kTileBytes);
      load(kKeys, Shape::keys(s), Shape::kKeys, key, Shape::full_keys(s));
      key.row += Shape::kKeys;
    };
    if (work.tiles > 0) keys(n);
    // Queries come after the first keys: the output of the previous work may still occupy their place.
    m.wait(Shape::kFreeQueries, parity);
    m.expect(Shape::kFullQueries, Shape::kConsumers * panel_bytes(plan.rows * plan.heads) * Shape::kPanels);
    for (int group = 0; group < Shape::kConsumers; ++group) {
      load(kQueries, Shape::queries() + group * panel_bytes(kGroupRows), Shape::kRows,
           place_of(plan, kQueries, work, work.extent, work.first + group * plan.rows), Shape::kFullQueries);
    }
    for (int tile = 0; tile < work.tiles; ++tile, ++n) {
      if (tile + 1 < work.tiles) keys(n + 1);
      const int s = stage<Shape>(n);
      m.wait(Shape::free_values(s), free_parity<Shape>(n));
      m.expect(Shape::full_values(s), Shape::kTileBytes);
      load(kValues, Shape::values(s), Shape::kKeys, value, Shape::full_values(s));
      value.row += Shape::kKeys;
    }
    parity ^= 1;
  }
}

// The keys that every row of a consumer sees.
FASTATTN_HD Range common_keys(const Plan& plan, const Work& work, int group) {
  const int first = work.first + group * plan.rows;
  return {visible_keys(plan.f, work.extent, first + plan.rows - 1).begin,
          visible_keys(plan.f, work.extent, first).end};
}

// The factor from scores to exponents of 2, and with a cap, the factor before tanh.
struct Scaling {
  float scale, inner;
};

constexpr float kLog2e = 1.4426950408889634f;

FASTATTN_HD constexpr Scaling scaling(const FastattnForward& f) {
  const bool capped = f.softcap > 0.0f;
  return {(capped ? f.softcap : f.scale) * kLog2e, capped ? f.scale / f.softcap : 1.0f};
}

// tanh from one exponential; near 0, where 1 - 2 / (e^2x + 1) cancels, from a series.
template <class Machine>
FASTATTN_DEVICE float tanh(Machine& m, float x) {
  const float square = x * x;
  const float near = x * (1.0f - square * (0.3333333333f - square * (0.1333333333f - square * 0.0539682540f)));
  const float far = 1.0f - 2.0f * m.inverse(m.exp2(x * (2.0f * kLog2e)) + 1.0f);
  return square < 0.01f ? near : far;
}

// Turns scores into weights relative to the running maximum and updates it; `correction` is the factor for earlier
// sums.
template <class Shape, class Machine>
FASTATTN_DEVICE void weigh(Machine& m, int first_key, const Range& common, const Scaling& scaling) {
  constexpr int kElements = Shape::kKeys / 2;
  const float scale = scaling.scale;
  m.each([&](auto& t) {
    if (m.capped()) {
      FASTATTN_UNROLL for (int i = 0; i < kElements; ++i) t.s[i] = tanh(m, t.s[i] * scaling.inner);
    }
    // The condition is the same for all threads: wgmma, elect.sync and shuffles require that warps do not diverge.
    if (first_key < common.begin || first_key + Shape::kKeys > common.end) {
      const int start = first_key + fragment_column(t.index, 0);
      const int before[2] = {t.begin[0] - start, t.begin[1] - start};
      FASTATTN_UNROLL for (int i = 0; i < kElements; ++i) {
        const int column = fragment_column(0, i) - before[i / 2 % 2];  // a negative one is a large unsigned number
        if (uint32_t(column) >= uint32_t(t.seen[i / 2 % 2])) t.s[i] = -kInfinity;
      }
    }
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) t.peak[r] = t.maximum[r];
    FASTATTN_UNROLL for (int i = 0; i < kElements; ++i) t.peak[i / 2 % 2] = fmaxf(t.peak[i / 2 % 2], t.s[i]);
  });
  m.quad_max(&Machine::Registers::peak);
  m.each([&](auto& t) {
    float base[2];
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      base[r] = t.peak[r] == -kInfinity ? 0.0f : t.peak[r] * scale;  // no key seen yet: -inf - -inf is NaN
      t.correction[r] = m.exp2(t.maximum[r] * scale - base[r]);
      t.maximum[r] = t.peak[r];
      t.sum[r] *= t.correction[r];
    }
    FASTATTN_UNROLL for (int i = 0; i < kElements; ++i) {
      t.s[i] = m.exp2(t.s[i] * scale - base[i / 2 % 2]);
      t.sum[i / 2 % 2] += t.s[i];
    }
  });
}

// Packs weights into the operand of the next product and corrects the output, once the previous product has ended.
template <class Shape, class Machine>
FASTATTN_DEVICE void hand_over(Machine& m) {
  m.each([&](auto& t) {
    FASTATTN_UNROLL for (int i = 0; i < Shape::kKeys / 4; ++i) t.p[i] = m.pack(t.s[2 * i], t.s[2 * i + 1]);
    FASTATTN_UNROLL for (int i = 0; i < Shape::kDim / 2; ++i) t.o[i] *= t.correction[i / 2 % 2];
  });
}

template <class Shape, class Machine>
FASTATTN_DEVICE void start_rows(Machine& m, const Plan& plan, const Work& work, int group) {
  m.each([&](auto& t) {
    FASTATTN_UNROLL for (int i = 0; i < Shape::kDim / 2; ++i) t.o[i] = 0.0f;
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = work.first + group * plan.rows + fragment_row(t.index, 2 * r) / plan.heads;
      const Range visible = visible_keys(plan.f, work.extent, row);
      t.begin[r] = visible.begin;
      t.seen[r] = visible.end > visible.begin ? visible.end - visible.begin : 0;
      t.maximum[r] = -kInfinity;
      t.sum[r] = 0.0f;
    }
  });
}

// Writes the output into shared memory in place of the group's queries. TMA stores it from there, without rows past the
// end.
template <class Shape, class Machine>
FASTATTN_DEVICE void finish_rows(Machine& m, const Plan& plan, const Work& work, int group, float scale) {
  const FastattnForward& f = plan.f;
  m.quad_sum(&Machine::Registers::sum);
  m.sync(kStaging + group, kGroupThreads);  // all warps of the group have multiplied with its queries
  const Extent& extent = work.extent;
  const int batch = packed(f) ? 0 : work.entry;
  m.each([&](auto& t) {
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      const int own = fragment_row(t.index, 2 * r), inside = own / plan.heads;
      const int row = work.first + group * plan.rows + inside, head = work.head + own - inside * plan.heads;
      const float sink = f.sinks == nullptr ? -kInfinity : f.sinks[head] * kLog2e;
      const float maximum = t.maximum[r] * scale, top = fmaxf(maximum, sink), base = top == -kInfinity ? 0.0f : top;
      const float share = m.exp2(maximum - base), total = t.sum[r] * share + m.exp2(sink - base);
      const float inverse = total == 0.0f ? 0.0f : share / total;  // no key is allowed: the output is 0
      FASTATTN_UNROLL for (int i = 0; i < Shape::kDim / 8; ++i) {
        m.put(m.shared() + Shape::queries() + tile_offset(Shape::kRows, group * kGroupRows + own, i) + t.index % 4 * 4,
              m.pack(t.o[4 * i + 2 * r] * inverse, t.o[4 * i + 2 * r + 1] * inverse));
      }
      if (t.index % 4 == 0 && inside < plan.rows && row < extent.q_len) {
        const int64_t at = (int64_t(batch) * f.q_heads + head) * f.q_len + extent.q_start + row;
        const float log_total = m.log2(total);
        f.lse[at] = (top + log_total) * 0.6931471805599453f;
        f.statistics[at] = base;
        f.statistics[statistics_plane(f) + at] = total == 0.0f ? 0.0f : log_total;
      }
    }
  });
  m.fence();
  m.sync(kStaging + group, kGroupThreads);
  m.elected([&] {
    const uint32_t own = m.shared() + Shape::queries() + group * panel_bytes(kGroupRows);
    const Place place = place_of(plan, kOut, work, extent, work.first + group * plan.rows);
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      m.store(kOut, own + panel * panel_bytes(Shape::kRows), panel * 64, place);
    }
    m.stored();
    m.arrive(Shape::kFreeQueries);
  });
}

template <class Shape, class Machine>
FASTATTN_DEVICE void consume(Machine& m, const Plan& plan, int group) {
  using Own = typename Machine::Registers;
  const Scaling scales = scaling(plan.f);
  const auto scores = [&](int n) {
    m.begin(&Own::s);
    FASTATTN_UNROLL for (int k = 0; k < Shape::kDim / 16; ++k) {
      m.scores(&Own::s, row_descriptor(m.shared() + Shape::queries(), Shape::kRows, group * kGroupRows, k),
               row_descriptor(m.shared() + Shape::keys(stage<Shape>(n)), Shape::kKeys, 0, k), k > 0);
    }
    m.commit();
  };
  const auto values = [&](int n) {
    m.begin(&Own::o, &Own::p);
    FASTATTN_UNROLL for (int k = 0; k < Shape::kKeys / 16; ++k) {
      m.values(&Own::o, &Own::p, k, value_descriptor(m.shared() + Shape::values(stage<Shape>(n)), Shape::kKeys, k));
    }
    m.commit();
  };

  if (group == Shape::kConsumers - 1) m.signal(kTurn, 2 * kGroupThreads);  // the first turn is the first group's
  int n = 0, parity = 0;
  for (int index = m.block(); index < plan.works; index += m.blocks()) {
    const Work work = work_at<Shape>(plan, index);
    if (work.empty()) continue;
    const Range common = common_keys(plan, work, group);
    start_rows<Shape>(m, plan, work, group);
    m.wait(Shape::kFullQueries, parity);
    if (work.tiles > 0) {
      m.wait(Shape::full_keys(stage<Shape>(n)), full_parity<Shape>(n));
      scores(n);
      m.finish(kNone, &Own::s, &Own::o, &Own::p);
      m.release(Shape::free_keys(stage<Shape>(n)));
      weigh<Shape>(m, work.first_key, common, scales);
      hand_over<Shape>(m);
      for (int tile = 1; tile < work.tiles; ++tile, ++n) {
        m.wait(Shape::full_keys(stage<Shape>(n + 1)), full_parity<Shape>(n + 1));
        m.sync(kTurn + group, 2 * kGroupThreads);  // waits for the consumer before
        scores(n + 1);
        m.wait(Shape::full_values(stage<Shape>(n)), full_parity<Shape>(n));
        values(n);
        m.signal(kTurn + (group + 1) % Shape::kConsumers, 2 * kGroupThreads);
        m.finish(kOne, &Own::s);
        m.release(Shape::free_keys(stage<Shape>(n + 1)));
        weigh<Shape>(m, work.first_key + tile * Shape::kKeys, common, scales);
        m.finish(kNone, &Own::s, &Own::o, &Own::p);
        m.release(Shape::free_values(stage<Shape>(n)));
        hand_over<Shape>(m);
      }
      m.wait(Shape::full_values(stage<Shape>(n)), full_parity<Shape>(n));
      values(n);
      m.finish(kNone, &Own::s, &Own::o, &Own::p);
      m.release(Shape::free_values(stage<Shape>(n)));
      ++n;
    }
    finish_rows<Shape>(m, plan, work_at<Shape>(plan, m.again(index)), group, scales.scale);
    parity ^= 1;
  }
}

// The whole block. Group 0 loads, the others compute.
template <class Shape, class Machine>
FASTATTN_DEVICE void attend(Machine& m, const Plan& plan, int group) {
  if (group == 0) m.elected([&] { prepare<Shape>(m); });
  m.sync(kEveryone, Shape::kThreads);
  if (group == 0) {
    m.template registers<Shape::kLoaderRegisters, false>();
    m.elected([&] { produce<Shape>(m, plan); });
  } else {
    m.template registers<Shape::kConsumerRegisters, true>();
    consume<Shape>(m, plan, group - 1);
  }
}

}  // namespace fastattn
