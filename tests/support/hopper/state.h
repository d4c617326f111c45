// The state of a block between two operations, and the rules of the machine. What breaks one is thrown as a Report.
//
// Races are found by what happens before what, not by luck: every role, and every unit that works asynchronously, has a
// clock. Whoever waits for something learns the clocks of those who made it happen; an access to memory must know of
// every earlier access that it conflicts with. So an order that shows a race need not be the one in which it bites.
//
// Names in quotation marks are sections of the PTX ISA.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "op.h"

namespace hopper {

struct Report {
  std::string kind, text;
};

constexpr int kMbarriers = 16, kNamed = 8;
constexpr int kPool = 65536;  // registers

// Components of a clock: roles, loads counted by the mbarrier that they complete on, and of each role its groups of
// wgmma, its stores, and its proxy fences that a barrier has followed.
constexpr int kLoads = kRoles, kProducts = kLoads + kMbarriers, kStores = kProducts + kRoles,
              kFences = kStores + kRoles, kClocks = kFences + kRoles;

struct Clock {
  std::array<uint16_t, kClocks> at{};
  void learn(const Clock& other) {
    for (int i = 0; i < kClocks; ++i) at[i] = std::max(at[i], other.at[i]);
  }
};

struct Mbarrier {
  Clock arriving, passed;
  int32_t bytes = 0;
  int16_t count = 0, pending = 0;
  uint16_t phase = 0, issued = 0, delivered = 0;
  uint16_t made = 0, fence = 0;  // the loader's clock when it was made, and the fence that shows it to TMA
  uint16_t unused = 0;           // no padding: states are compared byte by byte
};

struct NamedBarrier {
  Clock arriving, passed;
  int16_t expected = 0, arrived = 0;
  uint16_t generation = 0, roles = 0;
};

struct Cell {
  uint64_t content = 0;
  uint32_t weight = 1;  // how many of 1024 bytes it stands for
  uint16_t writer = 0;  // component
  uint16_t written = 0, fence = 0;
  std::array<uint16_t, 3 * kRoles> read{};  // by products and stores of each role, and by its ordinary loads
  std::array<uint16_t, 3> unused{};
};

struct Role {
  Clock clock;
  uint16_t position = 0;  // in its trace
  uint16_t inside = 0, generation = 0;  // waits in a named barrier, until that has another generation
  uint16_t fenced = 0, committed = 0, ended = 0, stores = 0;
  uint16_t together = 0, unused = 0;  // products that have ended as all its warps know, not only each for itself
  int16_t registers = 0, needed = 0;  // given to a thread; what its values alone fill
  std::array<int16_t, kMbarriers> seen{};           // the last phase that it waited for
  std::array<uint8_t, 4> flying{};                  // registers of committed groups of products, by number
  uint8_t open = 0, dirty = 0xFF;                   // of products not committed; used since the last fence
};

template <int kCells>
struct State {
  std::array<Cell, kCells> cells{};
  std::array<Mbarrier, kMbarriers> mbarriers{};
  std::array<NamedBarrier, kNamed> named{};
  std::array<Role, kRoles> roles{};
  int32_t pool = kPool;

  // A block of so many warp groups, each of whose threads has as many registers as go round, by 8.
  explicit State(int groups) {
    const int registers = kPool / (groups * kRoleThreads) / 8 * 8;
    pool -= registers * groups * kRoleThreads;
    for (int r = 0; r < kRoles; ++r) {
      roles[r].seen.fill(-1);
      roles[r].clock.at[r] = 1;
      roles[r].registers = int16_t(registers);
    }
  }

  bool enabled(int r, const Op& op) const {
    const Role& role = roles[r];
    switch (op.kind) {
      // "mbarrier.test_wait": true if the phase of this parity has ended, which is the one before the current.
      case Kind::kWait: return mbarriers[op.barrier].count == 0 || mbarriers[op.barrier].phase % 2 != op.value;
      case Kind::kSync: return !role.inside || named[op.barrier].generation != role.generation;
      // "setmaxnreg": inc waits until the pool has enough.
      case Kind::kRegisters: return (std::abs(op.value) - role.registers) * kRoleThreads <= pool;
      default: return true;
    }
  }

  // Carry out `op`, which is enabled. False: it waits inside a named barrier and goes on when enabled again.
  // `record`: what a product or store reads is not compared with op.content but put there.
  bool step(int r, Op& op, bool record = false) {
    Role& role = roles[r];
    switch (op.kind) {
      case Kind::kInit: init(r, op); break;
      case Kind::kExpect:
        arrive(r, op.barrier, 1, op.value);
        break;
      case Kind::kArrive: arrive(r, op.barrier, op.value, 0); break;
      case Kind::kWait: wait(r, op); break;
      case Kind::kLoad: load(r, op); break;
      case Kind::kStore:
        read(r, op, kStores + r, role.stores + 1, record);
        ++role.stores;
        break;
      case Kind::kStored: role.clock.at[kStores + r] = role.stores; break;
      case Kind::kPut:
        for (uint8_t c : op.cells) {
          overwrite(r, cells[c], false);
          cells[c].writer = uint16_t(r);
          cells[c].written = role.clock.at[r];
          cells[c].fence = role.fenced + 1;
          cells[c].content = op.content;
        }
        break;
      case Kind::kGet: get(r, op, record); break;
      case Kind::kProxy: ++role.fenced; break;
      case Kind::kSync: return sync(r, op);
      case Kind::kSignal: join(r, op); break;
      case Kind::kRegisters: set_registers(r, op); break;
      case Kind::kFence: role.dirty = 0; break;
      case Kind::kProduct: product(r, op, record); break;
      case Kind::kCommit:
        ++role.committed;
        role.flying[role.committed % 4] = role.open;
        role.open = 0;
        break;
      case Kind::kFinish:
        role.ended = std::max<int>(role.ended, role.committed - op.value);
        role.clock.at[kProducts + r] = role.ended;
        break;
      case Kind::kTouch:
        if (role.registers < role.needed) throw Report{"register budget", "fewer than the values that they hold"};
        if (in_flight(role) & op.registers) throw Report{"registers in flight", "used before the products ended"};
        role.dirty |= op.registers;
        break;
    }
    return true;
  }

  // TMA has written the oldest load of this mbarrier that is under way.
  void deliver(int barrier, int bytes) {
    Mbarrier& b = mbarriers[barrier];
    ++b.delivered;
    b.bytes -= bytes;
    end_phase(barrier);
  }

  // When all roles have come to their ends.
  void end() const {
    for (const Mbarrier& b : mbarriers) {
      if (b.issued != b.delivered) throw Report{"ended too early", "a load was under way when the block ended"};
    }
    for (int r = 0; r < kRoles; ++r) {
      const Role& role = roles[r];
      if (role.clock.at[kStores + r] != role.stores) {
        throw Report{"ended too early", "a store was reading when the block ended"};
      }
      if (role.ended != role.committed || role.open) throw Report{"ended too early", "a product had not ended"};
    }
  }

 private:
  void init(int r, const Op& op) {
    Mbarrier& b = mbarriers[op.barrier];
    if (b.count != 0) throw Report{"barrier misuse", "initialised twice"};
    b.count = b.pending = int16_t(op.value);
    b.made = roles[r].clock.at[r];
    b.fence = roles[r].fenced + 1;
  }

  Mbarrier& made(int r, int barrier) {
    Mbarrier& b = mbarriers[barrier];
    if (b.count == 0 || roles[r].clock.at[0] < b.made) throw Report{"barrier misuse", "used before it is initialised"};
    return b;
  }

  void arrive(int r, int barrier, int count, int bytes) {
    Mbarrier& b = made(r, barrier);
    if (b.pending < count) throw Report{"barrier misuse", "more arrivals than a phase has"};
    b.pending -= int16_t(count);
    b.bytes += bytes;
    if (std::abs(b.bytes) >= 1 << 20) throw Report{"barrier misuse", "more bytes than a phase can count"};
    b.arriving.learn(roles[r].clock);
    ++roles[r].clock.at[r];
    end_phase(barrier);
  }

  // "Phase Completion of the mbarrier object": no arrivals pending and no bytes.
  void end_phase(int barrier) {
    Mbarrier& b = mbarriers[barrier];
    if (b.pending != 0 || b.bytes != 0) return;
    b.arriving.at[kLoads + barrier] = b.delivered;
    b.passed.learn(b.arriving);
    b.pending = b.count;
    ++b.phase;
  }

  // Each role waits for each phase once. A parity that does not alternate lets it pass on one that it has seen.
  void wait(int r, const Op& op) {
    const Mbarrier& b = made(r, op.barrier);
    int16_t& seen = roles[r].seen[op.barrier];
    if (seen >= 0 && b.phase != seen + 1) {
      throw Report{"wrong phase", b.phase == seen ? "passed on a phase that it has seen" : "missed a phase"};
    }
    seen = int16_t(b.phase);
    roles[r].clock.learn(b.passed);
  }

  // An access of role r, or asynchronously on its behalf, to what was written before.
  void after_write(int r, const Cell& cell, bool asynchronous, const char* kind) const {
    const Clock& clock = roles[r].clock;
    if (cell.written == 0) return;
    if (clock.at[cell.writer] < cell.written) throw Report{kind, "the write before is not known to have ended"};
    // "Proxies": ordinary writes are seen by wgmma and TMA after a fence of those who wrote, then a barrier.
    if (asynchronous && cell.writer < kRoles && clock.at[kFences + cell.writer] < cell.fence) {
      throw Report{"proxy fence missing", "ordinary writes are read or overwritten by TMA or wgmma"};
    }
  }

  void overwrite(int r, Cell& cell, bool asynchronous) const {
    const Clock& clock = roles[r].clock;
    after_write(r, cell, asynchronous, "overwrite before release");
    for (int i = 0; i < kRoles; ++i) {
      // An ordinary write of one warp, beside those of the same group that may still multiply.
      const int ended = i == r && !asynchronous ? roles[r].together : clock.at[kProducts + i];
      if (ended < cell.read[i] || clock.at[kStores + i] < cell.read[kRoles + i] ||
          (i != r && clock.at[i] < cell.read[2 * kRoles + i])) {
        throw Report{"overwrite before release", "a reader is not known to have ended"};
      }
    }
  }

  void load(int r, const Op& op) {
    Mbarrier& b = made(r, op.barrier);
    if (roles[r].clock.at[kFences] < b.fence) {
      throw Report{"proxy fence missing", "TMA completes on a barrier that it may not see yet"};
    }
    ++b.issued;
    for (uint8_t c : op.cells) {
      Cell& cell = cells[c];
      overwrite(r, cell, true);
      cell.writer = uint16_t(kLoads + op.barrier);
      cell.written = b.issued;
      cell.fence = 0;
      cell.read = {};
      cell.content = op.content;
    }
  }

  void read(int r, Op& op, int component, int number, bool record) {
    uint64_t content = 0;
    for (uint8_t c : op.cells) {
      Cell& cell = cells[c];
      after_write(r, cell, true, "read before arrival");
      cell.read[component - kProducts] = uint16_t(number);
      content += cell.content * cell.weight;
    }
    compare(op, content, record);
  }

  void get(int r, Op& op, bool record) {
    uint64_t content = 0;
    for (uint8_t c : op.cells) {
      after_write(r, cells[c], false, "read before arrival");
      cells[c].read[2 * kRoles + r] = roles[r].clock.at[r];
      content += cells[c].content * cells[c].weight;
    }
    compare(op, content, record);
  }

  static void compare(Op& op, uint64_t content, bool record) {
    if (record) op.content = content;
    else if (content != op.content) throw Report{"wrong tile", "reads what was meant for another product or store"};
  }

  void product(int r, Op& op, bool record) {
    Role& role = roles[r];
    // "wgmma.fence": between any other use of the registers and a product that uses them.
    if (role.dirty & op.registers) throw Report{"wgmma fence missing", "registers were used since the last fence"};
    read(r, op, kProducts + r, role.committed + 1, record);
    role.open |= uint8_t(op.registers);
  }

  static int in_flight(const Role& role) {
    int registers = role.open;
    for (int group = role.ended + 1; group <= role.committed; ++group) registers |= role.flying[group % 4];
    return registers;
  }

  // "bar, barrier": all who take part name the same number of threads.
  void join(int r, const Op& op) {
    NamedBarrier& b = named[op.barrier];
    if (b.arrived > 0 && b.expected != op.value) throw Report{"barrier misuse", "two numbers of threads in bar"};
    if (b.roles >> r & 1) throw Report{"barrier misuse", "the same threads arrive twice in bar"};
    b.expected = int16_t(op.value);
    b.arrived += kRoleThreads;
    b.roles |= uint16_t(1 << r);
    b.arriving.learn(roles[r].clock);
    ++roles[r].clock.at[r];
    if (b.arrived > b.expected) throw Report{"barrier misuse", "more threads than bar names"};
    if (b.arrived == b.expected) {
      b.passed = b.arriving;
      b.arriving = {};
      b.arrived = 0;
      b.roles = 0;
      ++b.generation;
    }
  }

  bool sync(int r, const Op& op) {
    Role& role = roles[r];
    NamedBarrier& b = named[op.barrier];
    if (!role.inside) {
      role.clock.at[kFences + r] = role.fenced;  // all threads of the group have fenced before any goes on
      role.together = role.ended;
      role.generation = b.generation;
      join(r, op);
      role.inside = 1;
      if (b.generation == role.generation) return false;
    }
    role.inside = 0;
    role.clock.learn(b.passed);
    return true;
  }

  void set_registers(int r, const Op& op) {
    Role& role = roles[r];
    const int count = std::abs(op.value);
    if (count < 24 || count > 256 || count % 8 != 0) throw Report{"register budget", "expected 24 to 256 by 8"};
    if ((op.value < 0) != (count < role.registers)) throw Report{"register budget", "inc takes, or dec gives"};
    pool += (role.registers - count) * kRoleThreads;
    role.registers = int16_t(count);
  }
};
static_assert(std::has_unique_object_representations_v<Role> && std::has_unique_object_representations_v<Mbarrier> &&
              std::has_unique_object_representations_v<NamedBarrier> && std::has_unique_object_representations_v<Cell>);

}  // namespace hopper
