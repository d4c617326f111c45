// One block of a backward pass (passes.cuh), specialised by warp group like the forward pass, on the same Machine.
//
// The loader fills stages of passing rows. A consumer has 64 own rows. It starts the products of the next tile, X U^T
// and Y W^T, together with the products that add this tile to the sums. While the latter still run, it computes the
// weights and gradients of the next tile, which stay in registers. One consumer adds up all of its rows in one order,
// so repeats are bit-equal.
#pragma once

#include "forward.cuh"
#include "passes.cuh"

namespace fastattn {

enum HeldInPass { kOfScores = 1, kOfProducts = 2, kOfWeights = 4, kOfGradients = 8, kOfFirst = 16, kOfSecond = 32 };

template <class Shape, template <class, int, int> class Array>
struct PassRegisters {
  static constexpr int kElements = Shape::kPassing / 2, kSums = Shape::kDim / 2, kAbsent = 2;
  int index;  // 0 to 127
  Array<float, kElements, kOfScores> s;                                       // X U^T, then weights
  Array<float, Shape::kFirst ? kElements : kAbsent, kOfProducts> d;           // Y W^T, then gradients of the scores
  Array<uint32_t, Shape::kSecond ? kElements / 2 : kAbsent, kOfWeights> p;    // p, g: the inputs' dtype, as operands A
  Array<uint32_t, Shape::kFirst ? kElements / 2 : kAbsent, kOfGradients> g;
  Array<float, Shape::kFirst ? kSums : kAbsent, kOfFirst> first;              // dS U
  Array<float, Shape::kSecond ? kSums : kAbsent, kOfSecond> second;           // P W
  float log[2], delta[2];  // lse and delta of rows r and r + 8, if queries are own rows
};

template <class Shape, class Machine>
FASTATTN_DEVICE void prepare_pass(Machine& m) {
  m.init(Shape::kFullOwn, 1);
  m.init(Shape::kFreeOwn, Shape::kConsumers);
  for (int s = 0; s < Shape::kStages; ++s) {
    m.init(Shape::full(s), 1);
    m.init(Shape::free(s), 4 * Shape::kConsumers);
  }
  m.publish();
}

// The loader, one thread.
template <class Shape, class Machine>
FASTATTN_DEVICE void produce_pass(Machine& m, const PassPlan& plan) {
  constexpr int kOwnOperands = Shape::kFirst ? 2 : 1;  // dV alone needs no V
  const auto load = [&](Operand operand, uint32_t to, int rows, const Place& place, int barrier) {
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      m.load(operand, m.shared() + to + panel * panel_bytes(rows), panel * 64, place, barrier);
    }
  };
  int n = 0, parity = 1;
  for (int index = m.block(); index < plan.works; index += m.blocks()) {
    const PassWork work = work_at<Shape>(plan, index);
    if (work.empty) continue;
    int head = work.passing_head, row = work.first_passing;
    const auto pass = [&] {
      const int s = stage<Shape>(n), full = Shape::full(s);
      m.wait(Shape::free(s), free_parity<Shape>(n));
      m.expect(full, 2 * Shape::kPassingBytes + Shape::kColumnBytes);
      load(Shape::kU, Shape::passing(s, 0), Shape::kPassing, place_of(plan, Shape::kU, work, head, row), full);
      load(Shape::kW, Shape::passing(s, 1), Shape::kPassing, place_of(plan, Shape::kW, work, head, row), full);
      if constexpr (Shape::kOfKeys) {
        m.copy(m.shared() + Shape::columns(s), plan.rows + row_place(plan.f, work.entry, head, row),
               Shape::kColumnBytes, full);
      }
      ++n;
      row += Shape::kPassing;
      if (row == work.first_passing + work.tiles * Shape::kPassing) row = work.first_passing, ++head;
    };
    const int tiles = work.heads * work.tiles;
    if (tiles > 0) pass();
    // Own rows come after the first tile: gradients of the previous work may still occupy their place.
    m.wait(Shape::kFreeOwn, parity);
    m.expect(Shape::kFullOwn, kOwnOperands * Shape::kOwnBytes);
    for (int second = 0; second < kOwnOperands; ++second) {
      const Operand operand = second ? Shape::kY : Shape::kX;
      for (int own = 0; own < Shape::kRows; own += Shape::kPassing) {
        load(operand, Shape::own(second) + panel_bytes(own), Shape::kRows,
             place_of(plan, operand, work, work.head, work.first + own), Shape::kFullOwn);
      }
    }
    for (int tile = 1; tile < tiles; ++tile) pass();
    parity ^= 1;
  }
}

// The passing rows that form a visible pair with every own row of a consumer.
template <class Shape>
FASTATTN_HD Range common_rows(const PassPlan& plan, const PassWork& work, int group) {
  const int own = work.first + group * kGroupRows;
  return {passing_rows<Shape>(plan.f, work.extent, own + kGroupRows - 1).begin,
          passing_rows<Shape>(plan.f, work.extent, own).end};
}

// Turns scores into weights, and products of values into gradients of the scores before `scale`. `row` is the first
// passing row.
template <class Shape, class Machine>
FASTATTN_DEVICE void differentiate(Machine& m, const PassPlan& plan, int index, int group, const Range& common, int row,
                                   int stage, const Scaling& scaling) {
  constexpr int kElements = Shape::kPassing / 2;
  m.each([&](auto& t) {
    if (row < common.begin || row + Shape::kPassing > common.end) {  // the same for all threads
      const PassWork work = work_at<Shape>(plan, m.again(index));
      const int own = work.first + group * kGroupRows;
      const int thread = m.again(t.index);
      FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
        const Range seen = passing_rows<Shape>(plan.f, work.extent, own + fragment_row(thread, 2 * r));
        const int before = seen.begin - row - fragment_column(thread, 0);
        const uint32_t count = seen.end > seen.begin ? seen.end - seen.begin : 0;
        FASTATTN_UNROLL for (int i = 2 * r; i < kElements; i += i % 2 ? 3 : 1) {
          if (uint32_t(fragment_column(0, i) - before) >= count) t.s[i] = -kInfinity;
        }
      }
    }
    FASTATTN_UNROLL for (int i = 0; i < kElements; i += 4) {
      float columns[4] = {t.log[0], t.delta[0], t.log[1], t.delta[1]};
      if constexpr (Shape::kOfKeys) {
        m.get(m.shared() + Shape::columns(stage) + fragment_column(t.index, i) * 8, columns);
      }
      FASTATTN_UNROLL for (int j = 0; j < 4; ++j) {
        const int from = Shape::kOfKeys ? j % 2 * 2 : j / 2 * 2;
        float score = t.s[i + j], slope = 1.0f;
        if (m.capped()) {
          const float t = tanh(m, score * scaling.inner);
          slope = 1.0f - t * t;
          score = score == -kInfinity ? score : t;
        }
        const float weight = m.exp2(score * scaling.scale - columns[from]);
        t.s[i + j] = weight;
        if constexpr (Shape::kFirst) {
          t.d[i + j] = weight * (t.d[i + j] - columns[from + 1]);
          if (m.capped()) t.d[i + j] *= slope;
        }
      }
    }
  });
}

// Packs weights and gradients into the operands of the next products, once the previous products have read them.
template <class Shape, class Machine>
FASTATTN_DEVICE void hand_over_pass(Machine& m) {
  m.each([&](auto& t) {
    FASTATTN_UNROLL for (int i = 0; i < Shape::kPassing / 4; ++i) {
      if constexpr (Shape::kSecond) t.p[i] = m.pack(t.s[2 * i], t.s[2 * i + 1]);
      if constexpr (Shape::kFirst) t.g[i] = m.pack(t.d[2 * i], t.d[2 * i + 1]);
    }
  });
}

template <class Shape, class Machine>
FASTATTN_DEVICE void start_sums(Machine& m, const PassPlan& plan, const PassWork& work, int group) {
  m.each([&](auto& t) {
    FASTATTN_UNROLL for (int i = 0; i < Shape::kDim / 2; ++i) {
      if constexpr (Shape::kFirst) t.first[i] = 0.0f;
      if constexpr (Shape::kSecond) t.second[i] = 0.0f;
    }
    if constexpr (!Shape::kOfKeys) {
      FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
        const int row = work.first + group * kGroupRows + fragment_row(t.index, 2 * r);
        const bool inside = row < work.extent.q_len;
        const float* at = plan.rows + row_place(plan.f, work.entry, work.head, inside ? row : 0);
        t.log[r] = inside ? at[0] : kInfinity;
        t.delta[r] = inside ? at[1] : 0.0f;
      }
    }
  });
}

// Writes sums into shared memory in place of the group's own rows; TMA stores them from there.
template <class Shape, class Machine>
FASTATTN_DEVICE void finish_sums(Machine& m, const PassPlan& plan, const PassWork& work, int group) {
  m.sync(kStaging + group, kGroupThreads);  // all warps of the group have multiplied with its rows
  m.each([&](auto& t) {
    const int thread = m.again(t.index);
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      const int own = group * kGroupRows + fragment_row(thread, 2 * r);
      FASTATTN_UNROLL for (int i = 0; i < Shape::kDim / 8; ++i) {
        const uint32_t at = m.shared() + tile_offset(Shape::kRows, own, i) + thread % 4 * 4;
        const int e = 4 * i + 2 * r;
        if constexpr (Shape::kFirst) {
          m.put(at + Shape::own(0), m.pack(t.first[e] * plan.f.scale, t.first[e + 1] * plan.f.scale));
        }
        if constexpr (Shape::kSecond) m.put(at + Shape::own(1), m.pack(t.second[e], t.second[e + 1]));
      }
    }
  });
  m.fence();
  m.sync(kStaging + group, kGroupThreads);
  m.elected([&] {
    for (int second = Shape::kFirst ? 0 : 1; second < (Shape::kSecond ? 2 : 1); ++second) {
      const Operand operand = second ? Shape::kSecondSum : Shape::kFirstSum;
      for (int own = group * kGroupRows; own < (group + 1) * kGroupRows; own += Shape::kPassing) {
        const Place place = place_of(plan, operand, work, work.head, work.first + own);
        for (int panel = 0; panel < Shape::kPanels; ++panel) {
          m.store(operand, m.shared() + Shape::own(second) + panel_bytes(own) + panel * panel_bytes(Shape::kRows),
                  panel * 64, place);
        }
      }
    }
    m.stored();
    m.arrive(Shape::kFreeOwn);
  });
}

template <class Shape, class Machine>
FASTATTN_DEVICE void consume_pass(Machine& m, const PassPlan& plan, int group) {
  using Own = typename Machine::Registers;
  const Scaling scales = scaling(plan.f);
  const auto row_of = [&](uint32_t first, int second, int k) {
    return row_descriptor(first + Shape::own(second), Shape::kRows, group * kGroupRows, k);
  };
  const auto column_of = [&](int n, int second, int k) {
    return row_descriptor(m.shared() + Shape::passing(stage<Shape>(n), second), Shape::kPassing, 0, k);
  };
  const auto scores = [&](int n) {
    if constexpr (Shape::kFirst) m.begin(&Own::s, &Own::d);
    else m.begin(&Own::s);
    const uint32_t first = m.again(m.shared());  // otherwise the descriptors of all steps would fill the registers
    FASTATTN_UNROLL for (int k = 0; k < Shape::kDim / 16; ++k) {
      m.scores(&Own::s, row_of(first, 0, k), column_of(n, 0, k), k > 0);
    }
    if constexpr (Shape::kFirst) {
      FASTATTN_UNROLL for (int k = 0; k < Shape::kDim / 16; ++k) {
        m.scores(&Own::d, row_of(first, 1, k), column_of(n, 1, k), k > 0);
      }
    }
    m.commit();
  };
  const auto sums = [&](int n) {
    const auto passing = [&](int second, int k) {
      return value_descriptor(m.shared() + Shape::passing(stage<Shape>(n), second), Shape::kPassing, k);
    };
    if constexpr (Shape::kSecond) {
      m.begin(&Own::second, &Own::p);
      FASTATTN_UNROLL for (int k = 0; k < Shape::kPassing / 16; ++k) m.values(&Own::second, &Own::p, k, passing(1, k));
    }
    if constexpr (Shape::kFirst) {
      m.begin(&Own::first, &Own::g);
      FASTATTN_UNROLL for (int k = 0; k < Shape::kPassing / 16; ++k) m.values(&Own::first, &Own::g, k, passing(0, k));
    }
    m.commit();
  };
  const auto finish_scores = [&] {
    if constexpr (Shape::kFirst) m.finish(kOne, &Own::s, &Own::d);
    else m.finish(kOne, &Own::s);
  };
  const auto finish_all = [&] {
    if constexpr (Shape::kFirst && Shape::kSecond) {
      m.finish(kNone, &Own::s, &Own::d, &Own::p, &Own::g, &Own::first, &Own::second);
    } else if constexpr (Shape::kFirst) {
      m.finish(kNone, &Own::s, &Own::d, &Own::g, &Own::first);
    } else {
      m.finish(kNone, &Own::s, &Own::p, &Own::second);
    }
  };

  int n = 0, parity = 0;
  for (int index = m.block(); index < plan.works; index += m.blocks()) {
    const PassWork work = work_at<Shape>(plan, index);
    if (work.empty) continue;
    const Range common = common_rows<Shape>(plan, work, group);
    start_sums<Shape>(m, plan, work, group);
    m.wait(Shape::kFullOwn, parity);
    const int tiles = work.heads * work.tiles, end = work.first_passing + work.tiles * Shape::kPassing;
    if (tiles > 0) {
      int row = work.first_passing;
      m.wait(Shape::full(stage<Shape>(n)), full_parity<Shape>(n));
      scores(n);
      finish_all();
      differentiate<Shape>(m, plan, index, group, common, row, stage<Shape>(n), scales);
      hand_over_pass<Shape>(m);
      for (int tile = 1; tile < tiles; ++tile, ++n) {
        row += Shape::kPassing;
        if (Shape::kOfKeys && row == end) row = work.first_passing;  // the next head
        m.wait(Shape::full(stage<Shape>(n + 1)), full_parity<Shape>(n + 1));
        scores(n + 1);
        sums(n);
        finish_scores();
        differentiate<Shape>(m, plan, index, group, common, row, stage<Shape>(n + 1), scales);
        finish_all();
        m.release(Shape::free(stage<Shape>(n)));
        hand_over_pass<Shape>(m);
      }
      sums(n);
      finish_all();
      m.release(Shape::free(stage<Shape>(n)));
      ++n;
    }
    finish_sums<Shape>(m, plan, work_at<Shape>(plan, m.again(index)), group);
    parity ^= 1;
  }
}

// The whole block. Group 0 loads, the others compute.
template <class Shape, class Machine>
FASTATTN_DEVICE void run_pass(Machine& m, const PassPlan& plan, int group) {
  if (group == 0) m.elected([&] { prepare_pass<Shape>(m); });
  m.sync(kEveryone, Shape::kThreads);
  if (group == 0) {
    m.template registers<Shape::kLoaderRegisters, false>();
    m.elected([&] { produce_pass<Shape>(m, plan); });
  } else {
    m.template registers<Shape::kConsumerRegisters, true>();
    consume_pass<Shape>(m, plan, group - 1);
  }
}

// Before the passes, the 128 threads of a block compute lse and delta of a tile of 64 rows. Four threads share rows r
// and r + 32.
struct RowRegisters {
  int index;
  float delta[2];
};

template <class Machine>
FASTATTN_DEVICE void prepare_rows(Machine& m, const FastattnBackward& b, int index) {
  using Own = typename Machine::Registers;
  const FastattnForward& f = b.f;
  const int tiles = int(padded_rows(f) / kRowTile), head = index / tiles % f.q_heads;
  int tile = index % tiles, entry = index / tiles / f.q_heads;
  const int64_t to = int64_t(index) * kRowTile;
  if (packed(f)) {
    entry = sequence_of(query_starts(f), tile, kRowTile);
    tile -= first_tile(query_starts(f), entry, kRowTile);
  }
  const Extent e = extent_of(f, entry);
  const int64_t batch = packed(f) ? 0 : entry;
  const auto place = [&](const int64_t* stride, int row) {
    return batch * stride[0] + head * stride[1] + (e.q_start + row) * stride[2];
  };
  m.each([&](auto& t) {
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = tile * kRowTile + t.index / 4 + 32 * r;
      t.delta[r] = 0.0f;
      if (row >= e.q_len) continue;
      const auto* out = static_cast<const uint16_t*>(f.out) + place(f.out_stride, row);
      const auto* dout = static_cast<const uint16_t*>(b.dout) + place(b.dout_stride, row);
      for (int i = t.index % 4 * 8; i < f.head_dim; i += 32) {
        float x[8], y[8];
        m.elements(out + i, x);
        m.elements(dout + i, y);
        FASTATTN_UNROLL for (int j = 0; j < 8; ++j) t.delta[r] += x[j] * y[j];
      }
    }
  });
  m.quad_sum(&Own::delta);
  m.each([&](auto& t) {
    if (t.index % 4 != 0) return;
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      const int own = t.index / 4 + 32 * r, row = tile * kRowTile + own;
      const int64_t from = (batch * f.q_heads + head) * f.q_len + e.q_start + row;
      const bool inside = row < e.q_len;
      float* at = b.rows + 2 * (to + own);
      at[0] = inside ? f.statistics[from] + f.statistics[statistics_plane(f) + from] : kInfinity;
      at[1] = inside ? t.delta[r] - (b.dlse == nullptr ? 0.0f : b.dlse[from]) : 0.0f;
    }
  });
}

}  // namespace fastattn
