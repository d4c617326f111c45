// A Machine of csrc/cuda/forward.cuh and backward.cuh: numbers and addresses as the hardware has them, one fiber for each warp group.
//
// What the instructions do is written here a second time, from the PTX ISA and independently of csrc/cuda/layout.cuh:
// how a descriptor addresses shared memory, where TMA puts a box, where the elements of a fragment are. Shared memory
// starts as NaN. Whatever is asynchronous happens as late as it may, loads at a moment of chance. Every operation is
// recorded for explore.h and obeys the rules of state.h.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <set>

#include "box.h"
#include "backward.cuh"
#include "explore.h"
#include "numbers.h"

namespace hopper {

inline int touched = 0;  // arrays of registers that were used since the last look

template <class T, int N, int kBit>
struct Tracked {
  static constexpr int kBits = kBit, kSize = N;
  T at[N];
  T& operator[](int i) {
    touched |= kBit;
    return at[i];
  }
};

// One block while it runs. Roles are fibers; whenever another could notice what one does, chance says who goes on.
class Block {
 public:
  const bool half;
  const int number, count, groups;  // of blocks; of warp groups
  std::vector<uint8_t> memory;
  State<256> state;
  std::array<Trace, kRoles> traces;
  std::array<std::vector<std::pair<int, std::function<void()>>>, kMbarriers> loads;  // bytes, and what TMA does

  Block(bool half, int number, int count, int groups, size_t bytes, uint64_t seed)
      : half(half), number(number), count(count), groups(groups),
        memory(kBase + bytes, 0xFF), state(groups), random_(seed) {}

  void run(const std::vector<std::function<void()>>& bodies) {
    for (int role = 0; role < groups; ++role) start(role, bodies[role]);
    for (;;) {
      std::vector<int> ready;
      for (int role = 0; role < groups; ++role) {
        const Fiber& fiber = fibers_[role];
        if (!fiber.done && (fiber.next == nullptr || state.enabled(role, *fiber.next))) ready.push_back(role);
      }
      for (int b = 0; b < kMbarriers; ++b) {
        if (state.mbarriers[b].issued > state.mbarriers[b].delivered) ready.push_back(kRoles + b);
      }
      if (ready.empty()) break;
      const int chosen = ready[random_() % ready.size()];
      if (chosen < kRoles) {
        running_ = this;
        current_ = chosen;
        swapcontext(&scheduler_, &fibers_[chosen].context);
        if (report_) throw *report_;
      } else {
        const auto& [bytes, copy] = loads[chosen - kRoles][state.mbarriers[chosen - kRoles].delivered];
        copy();
        state.deliver(chosen - kRoles, bytes);
      }
    }
    for (int role = 0; role < groups; ++role) {
      if (!fibers_[role].done) throw Report{"deadlock", "every role waits"};
    }
    state.end();
  }

  void perform(int role, Op operation) {
    Trace& trace = traces[role];
    trace.push_back(std::move(operation));
    do {
      if (visible(trace.back().kind)) pause(role, &trace.back());
    } while (!state.step(role, trace.back(), true));
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::function<void()> body;
    const Op* next = nullptr;
    bool done = false;
  };
  std::array<Fiber, kRoles> fibers_;
  ucontext_t scheduler_;
  std::optional<Report> report_;
  std::mt19937_64 random_;
  inline static Block* running_ = nullptr;
  inline static int current_ = 0;

  void pause(int role, const Op* next) {
    fibers_[role].next = next;
    swapcontext(&fibers_[role].context, &scheduler_);
  }

  void start(int role, std::function<void()> body) {
    Fiber& fiber = fibers_[role];
    fiber.body = std::move(body);
    fiber.stack.resize(1 << 18);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter() {
    Block& block = *running_;
    const int role = current_;
    try {
      block.fibers_[role].body();
    } catch (const Report& report) {
      block.report_ = report;
    }
    block.fibers_[role].done = true;
  }
};

// One role of the block: a warp group.
template <class Shape, class Own, class Plan>
class Machine {
 public:
  using Registers = Own;

  Machine(Block& block, const Plan& plan, int role) : block_(block), plan_(plan), role_(role), threads_(role == 0 ? 0 : kRoleThreads) {
    if (role > 0) std::memset(static_cast<void*>(threads_.data()), 0xFF, threads_.size() * sizeof(Registers));
    for (size_t i = 0; i < threads_.size(); ++i) threads_[i].index = int(i);
    // Registers that hold no values of the loop are not counted.
    block.state.roles[role].needed = role == 0 ? 24 : int16_t(sizeof(Registers) / 4);
  }

  uint32_t shared() const { return kBase; }
  int block() const { return block_.number; }
  int blocks() const { return block_.count; }
  bool capped() const { return plan_.f.softcap > 0.0f; }

  template <class F>
  void each(F f) {
    touched = 0;
    written_.clear();
    got_.clear();
    for (auto& thread : threads_) f(thread);
    if (!got_.empty()) perform({Kind::kGet, 0, 0, 0, {got_.begin(), got_.end()}});
    if (touched) perform({Kind::kTouch, 0, 0, touched});
    if (!written_.empty()) perform({Kind::kPut, 0, 0, 0, {written_.begin(), written_.end()}, 1});
  }
  template <class F>
  void elected(F f) { f(); }

  template <int kCount, bool kMore>
  void registers() { perform({Kind::kRegisters, 0, kMore ? kCount : -kCount}); }
  void init(int barrier, int count) { perform({Kind::kInit, barrier, count}); }
  void publish() { perform({Kind::kProxy}); }
  void fence() { perform({Kind::kProxy}); }
  void wait(int barrier, int parity) { perform({Kind::kWait, barrier, parity}); }
  void arrive(int barrier) { perform({Kind::kArrive, barrier, 1}); }
  void release(int barrier) { perform({Kind::kArrive, barrier, kRoleThreads / 32}); }
  void expect(int barrier, uint32_t bytes) { perform({Kind::kExpect, barrier, int(bytes)}); }
  void sync(int id, int threads) { perform({Kind::kSync, id, threads}); }
  void signal(int id, int threads) { perform({Kind::kSignal, id, threads}); }

  void load(fastattn::Operand operand, uint32_t to, int column, const fastattn::Place& place, int barrier) {
    const Box box = box_of(operand, to, column, place);
    const int bytes = box.lines() * 128;
    block_.loads[barrier].emplace_back(bytes, [this, box] { box.copy(block_.memory, true); });
    perform({Kind::kLoad, barrier, bytes, 0, box.cells(), box.content()});
  }
  void copy(uint32_t to, const void* from, uint32_t bytes, int barrier) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) throw Report{"bad address", "a bulk copy by 16 bytes"};
    check(to, 16);
    check(to + bytes - 4, 4);
    block_.loads[barrier].emplace_back(
        int(bytes), [this, to, from, bytes] { std::memcpy(&block_.memory[to], from, bytes); });
    perform({Kind::kLoad, barrier, int(bytes), 0, {cell(to)}, uint64_t(reinterpret_cast<uintptr_t>(from))});
  }
  void store(fastattn::Operand operand, uint32_t from, int column, const fastattn::Place& place) {
    const Box box = box_of(operand, from, column, place);
    stores_.push_back(box);
    perform({Kind::kStore, 0, 0, 0, box.cells()});
  }
  void stored() {
    for (const Box& box : stores_) box.copy(block_.memory, false);
    stores_.clear();
    perform({Kind::kStored});
  }
  void put(uint32_t to, uint32_t value) {
    check(to, 4);
    std::memcpy(&block_.memory[to], &value, 4);
    written_.insert(cell(to));
  }
  void get(uint32_t from, float (&values)[4]) {
    check(from, 16);
    std::memcpy(values, &block_.memory[from], 16);
    got_.insert(cell(from));
  }

  template <class... Arrays>
  void begin(Arrays Own::*...) { perform({Kind::kFence}); }
  template <class To>
  void scores(To Own::*to, uint64_t a, uint64_t b, bool add) {
    read_k_major(a, 64);
    read_k_major(b, 2 * To::kSize);
    registers_ |= To::kBits;
    products_.push_back({committed_ + 1, [=] { multiply_scores(to, a, b, add); }});
  }
  template <class To, class From>
  void values(To Own::*to, From Own::*from, int k, uint64_t b) {
    for (int row = 0; row < 2 * To::kSize; row += 64) {
      for (int column = 0; column < 16; column += 8) reads_.insert(cell(mn_major(b, row, column)));
    }
    registers_ |= To::kBits | From::kBits;
    products_.push_back({committed_ + 1, [=] { multiply_values(to, from, k, b); }});
  }
  void commit() {
    perform({Kind::kProduct, 0, 0, registers_, {reads_.begin(), reads_.end()}});
    registers_ = 0;
    reads_.clear();
    ++committed_;
    perform({Kind::kCommit});
  }
  template <int N, class... Arrays>
  void finish(std::integral_constant<int, N>, Arrays Own::*...) {
    size_t done = 0;
    for (; done < products_.size() && products_[done].group <= committed_ - N; ++done) products_[done].carry_out();
    products_.erase(products_.begin(), products_.begin() + done);
    perform({Kind::kFinish, 0, N});
  }

  int again(int x) { return x; }
  template <class Array>
  void quad_max(Array Own::*array) {
    quads(array, [](float a, float b) { return fmaxf(a, b); });
  }
  template <class Array>
  void quad_sum(Array Own::*array) {
    quads(array, [](float a, float b) { return a + b; });
  }
  void elements(const uint16_t* from, float (&x)[8]) const {
    if (reinterpret_cast<uintptr_t>(from) % 16) throw Report{"bad address", "16 bytes of global memory"};
    for (int i = 0; i < 8; ++i) x[i] = widen(from[i], block_.half);
  }
  float exp2(float x) { return exp2f(x); }
  float log2(float x) { return log2f(x); }
  float inverse(float x) { return 1.0f / x; }
  uint32_t pack(float low, float high) { return narrow(low, block_.half) | uint32_t(narrow(high, block_.half)) << 16; }

 private:
  struct Product {
    int group;
    std::function<void()> carry_out;
  };

  Block& block_;
  const Plan& plan_;
  int role_;
  std::vector<Registers> threads_;
  std::set<uint8_t> reads_, written_, got_;
  std::vector<Product> products_;
  std::vector<Box> stores_;
  int registers_ = 0, committed_ = 0;

  void perform(Op op) { block_.perform(role_, std::move(op)); }

  void check(uint32_t address, uint32_t bytes) const {
    if (address < kBase || address + bytes > block_.memory.size() || address % bytes != 0) {
      throw Report{"bad address", std::to_string(address) + " in shared memory"};
    }
  }
  uint8_t cell(uint32_t address) const {
    check(address, 1);
    const uint32_t at = address - kBase;
    if constexpr (Shape::kBarrierPlace > Shape::kTiles) {  // columns: a cell for each stage
      if (at >= Shape::kTiles) return uint8_t(Shape::kTiles / 1024 + (at - Shape::kTiles) / Shape::kColumnBytes);
    }
    return uint8_t(at / 1024);
  }

  Box box_of(fastattn::Operand operand, uint32_t at, int column, const fastattn::Place& place) {
    Box box = {operand, fastattn::operand_map<Shape>(plan_, operand), at, {}};
    const int64_t start[] = {column, 0, place.row, place.head, place.batch};
    std::copy(start, start + 5, box.start);
    check(at, 1024);
    check(at + box.lines() * 128 - 1, 1);
    return box;
  }

  static uint32_t field(uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3FFF) * 16; }
  static uint32_t swizzled(uint32_t address) {
    const uint32_t row = address / 128 % 8, chunk = address / 16 % 8;
    return address - chunk * 16 + (chunk ^ row) * 16;
  }
  // Where the element at (row, column) of an operand of 16 columns is, its columns adjacent.
  uint32_t k_major(uint64_t descriptor, int row, int column) const {
    if (descriptor >> 62 != 1) throw Report{"bad address", "a descriptor without the 128-byte swizzle"};
    return swizzled(field(descriptor, 0) + row / 8 * field(descriptor, 32) + row % 8 * 128 + column * 2);
  }
  // The same of one that is stored transposed, 64 rows adjacent.
  uint32_t mn_major(uint64_t descriptor, int row, int column) const {
    if (descriptor >> 62 != 1) throw Report{"bad address", "a descriptor without the 128-byte swizzle"};
    return swizzled(field(descriptor, 0) + row / 64 * field(descriptor, 16) + row % 64 * 2 +
                    column / 8 * field(descriptor, 32) + column % 8 * 128);
  }
  void read_k_major(uint64_t descriptor, int rows) {
    for (int row = 0; row < rows; row += 8) reads_.insert(cell(k_major(descriptor, row, 0)));
  }
  float element(uint32_t address) const {
    check(address, 2);
    uint16_t bits;
    std::memcpy(&bits, &block_.memory[address], 2);
    return widen(bits, block_.half);
  }

  template <class To>
  void multiply_scores(To Own::*to, uint64_t a, uint64_t b, bool add) {
    static float left[64][16], right[16][2 * To::kSize];
    for (int i = 0; i < 16; ++i) {
      for (int row = 0; row < 64; ++row) left[row][i] = element(k_major(a, row, i));
      for (int row = 0; row < 2 * To::kSize; ++row) right[i][row] = element(k_major(b, row, i));
    }
    multiply(left, right, to, add);
  }
  template <class To, class From>
  void multiply_values(To Own::*to, From Own::*from, int k, uint64_t b) {
    static float left[64][16], right[16][2 * To::kSize];
    for (int lane = 0; lane < kRoleThreads; ++lane) {
      const int row = lane / 32 * 16 + lane % 32 / 4, column = lane % 4 * 2;
      for (int j = 0; j < 8; ++j) {  // a0 to a7: two per register; rows alternate every two, columns every four
        const uint32_t both = (threads_[lane].*from).at[4 * k + j / 2];
        left[row + (j / 2 % 2 ? 8 : 0)][column + (j >= 4 ? 8 : 0) + j % 2] =
            widen(uint16_t(both >> (j % 2 * 16)), block_.half);
      }
    }
    for (int i = 0; i < 16; ++i) {
      for (int row = 0; row < 2 * To::kSize; ++row) right[i][row] = element(mn_major(b, row, i));
    }
    multiply(left, right, to, true);
  }
  template <int kColumns, class To>
  void multiply(const float (&left)[64][16], const float (&right)[16][kColumns], To Own::*to, bool add) {
    static float sums[64][kColumns];
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < kColumns; ++column) sums[row][column] = 0.0f;
      for (int n = 0; n < 16; ++n) {
        const float factor = left[row][n];
        for (int column = 0; column < kColumns; ++column) sums[row][column] += factor * right[n][column];
      }
    }
    for (int lane = 0; lane < kRoleThreads; ++lane) {
      float* d = (threads_[lane].*to).at;
      for (int i = 0; i < kColumns / 2; ++i) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + (i % 4 >= 2 ? 8 : 0);
        const float sum = sums[row][i / 4 * 8 + lane % 4 * 2 + i % 2];
        d[i] = add ? d[i] + sum : sum;
      }
    }
  }

  template <class Array, class Combine>
  void quads(Array Own::*array, Combine combine) {
    for (size_t first = 0; first < threads_.size(); first += 4) {
      for (int r = 0; r < 2; ++r) {
        float result = (threads_[first].*array)[r];
        for (int i = 1; i < 4; ++i) result = combine(result, (threads_[first + i].*array)[r]);
        for (int i = 0; i < 4; ++i) (threads_[first + i].*array)[r] = result;
      }
    }
  }
};

}  // namespace hopper
