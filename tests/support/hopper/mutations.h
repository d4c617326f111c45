// Mistakes that a kernel of this kind invites, each made in the recorded operations of a right one, and the report that
// the model must give. What a mistake changes is said as one would make it in csrc/cuda/forward.cuh.
#pragma once

#include <functional>

#include "explore.h"

namespace hopper {

struct Mutation {
  const char* mistake;
  const char* report;
  std::function<void(Program&)> make;
};

// Barriers of a block with two stages, as layout.cuh numbers them.
namespace barrier {
constexpr int kFullQ = 0, kFreeQ = 1, kFullK = 2, kFreeK = 4, kFullV = 6, kFreeV = 8;
}

using Where = std::function<bool(int role, const Op& op)>;

inline Where at(Kind kind, int first = -1, int count = 2) {
  return [=](int, const Op& op) {
    return op.kind == kind && (first < 0 || (op.barrier >= first && op.barrier < first + count));
  };
}
inline Where in(int role, Where where) {
  return [=](int r, const Op& op) { return r == role && where(r, op); };
}

inline auto drop(Where where) {
  return [=](Program& program) {
    for (int role = 0; role < kRoles; ++role) {
      Trace& trace = program.traces[role];
      trace.erase(std::remove_if(trace.begin(), trace.end(), [&](const Op& op) { return where(role, op); }),
                  trace.end());
    }
  };
}

inline auto change(Where where, std::function<void(Op&)> edit) {
  return [=](Program& program) {
    for (int role = 0; role < kRoles; ++role) {
      for (Op& op : program.traces[role]) {
        if (where(role, op)) edit(op);
      }
    }
  };
}

// Each operation of `late` trades places with the nearest one of `early` before it.
inline auto trade(Where early, Where late) {
  return [=](Program& program) {
    for (int role = 0; role < kRoles; ++role) {
      Trace& trace = program.traces[role];
      for (size_t i = 0; i < trace.size(); ++i) {
        if (!late(role, trace[i])) continue;
        for (size_t before = i; before-- > 0;) {
          if (!early(role, trace[before])) continue;
          std::rotate(trace.begin() + before, trace.begin() + i, trace.begin() + i + 1);
          break;
        }
      }
    }
  };
}

inline auto twice(Where where) {
  return [=](Program& program) {
    for (int role = 0; role < kRoles; ++role) {
      Trace& trace = program.traces[role];
      for (size_t i = 0; i < trace.size(); ++i) {
        if (where(role, trace[i])) trace.insert(trace.begin() + i, trace[i]), ++i;
      }
    }
  };
}

// Those that an operation of kind `next` follows.
inline auto drop_before(Where where, Kind next) {
  return [=](Program& program) {
    for (int role = 0; role < kRoles; ++role) {
      Trace& trace = program.traces[role];
      for (size_t i = 0; i + 1 < trace.size(); ++i) {
        if (where(role, trace[i]) && trace[i + 1].kind == next) trace.erase(trace.begin() + i);
      }
    }
  };
}

// The last of each role only.
inline auto drop_last(Where where) {
  return [=](Program& program) {
    for (int role = 0; role < kRoles; ++role) {
      Trace& trace = program.traces[role];
      for (size_t i = trace.size(); i-- > 0;) {
        if (!where(role, trace[i])) continue;
        trace.erase(trace.begin() + i);
        break;
      }
    }
  };
}

// Loads and products of stage s use stage 1 - s of a ring whose cells start at `first`, `size` of them in each stage.
inline std::function<void(Op&)> other_stage(int first, int size) {
  return [=](Op& op) {
    for (uint8_t& cell : op.cells) {
      if (cell >= first && cell < first + 2 * size) cell = uint8_t(cell < first + size ? cell + size : cell - size);
    }
  };
}

inline bool is_scores(const Op& op) { return op.kind == Kind::kProduct && op.registers == 1; }
inline bool is_values(const Op& op) { return op.kind == Kind::kProduct && op.registers != 1; }

// `query_cells`, `tile_cells`: of 1024 bytes, in Q and in a stage of K or V.
inline std::vector<Mutation> mutations(int query_cells, int tile_cells) {
  using namespace barrier;
  const auto flip = [](Op& op) { op.value ^= 1; };
  const auto value = [](int n) { return [=](Op& op) { op.value = n; }; };
  const auto scaled = [](int by, int of) { return [=](Op& op) { op.value = op.value * by / of; }; };
  const auto on = [](int barrier) { return [=](Op& op) { op.barrier = barrier; }; };
  const Where scores = [](int, const Op& op) { return is_scores(op); };
  const Where values = [](int, const Op& op) { return is_values(op); };
  const auto finish = [](int n) {
    return [=](int, const Op& op) { return op.kind == Kind::kFinish && op.value == n; };
  };
  const auto touch = [](int mask) {
    return [=](int, const Op& op) { return op.kind == Kind::kTouch && op.registers & mask; };
  };
  const auto turns = [](Kind kind) { return at(kind, 1, 3); };
  const Where staging = at(Kind::kSync, 4, 3);
  const int keys = query_cells, all_values = query_cells + 2 * tile_cells;
  return {
      // The loader.
      {"keys are loaded without waiting for a free stage", "barrier misuse", drop(at(Kind::kWait, kFreeK))},
      {"values are loaded without waiting for a free stage", "overwrite before release", drop(at(Kind::kWait, kFreeV))},
      {"queries are loaded without waiting for their place", "overwrite before release",
       drop(at(Kind::kWait, kFreeQ, 1))},
      {"the loader waits for free keys with the other parity", "deadlock", change(at(Kind::kWait, kFreeK), flip)},
      {"the loader waits for free values with parity 1 for ever", "wrong phase",
       change(at(Kind::kWait, kFreeV), value(1))},
      {"the loader waits for free queries with parity 1 for ever", "wrong phase",
       change(at(Kind::kWait, kFreeQ, 1), value(1))},
      {"keys expect half their bytes", "read before arrival", change(at(Kind::kExpect, kFullK), scaled(1, 2))},
      {"keys expect twice their bytes", "deadlock", change(at(Kind::kExpect, kFullK), scaled(2, 1))},
      {"values expect one row too few", "deadlock", change(at(Kind::kExpect, kFullV), scaled(127, 128))},
      {"queries expect nothing, the barrier ends at once", "read before arrival",
       change(at(Kind::kExpect, kFullQ, 1), value(0))},
      {"queries expect the rows of one consumer", "read before arrival",
       change(at(Kind::kExpect, kFullQ, 1), scaled(1, 2))},
      {"queries expect a row too many", "deadlock", change(at(Kind::kExpect, kFullQ, 1), scaled(129, 128))},
      {"the last consumer's queries are not loaded", "deadlock", drop_last(at(Kind::kLoad, kFullQ, 1))},
      {"both consumers' queries go to the first one's place", "overwrite before release",
       change(at(Kind::kLoad, kFullQ, 1), [](Op& op) {
         for (uint8_t& cell : op.cells) cell = uint8_t(cell / 16 * 16 + cell % 8);
       })},
      {"the loader forgets to expect values", "deadlock", drop(at(Kind::kExpect, kFullV))},
      {"keys are expected twice", "barrier misuse", twice(at(Kind::kExpect, kFullK))},
      {"keys go to the other stage", "read before arrival",
       change(at(Kind::kLoad, kFullK), other_stage(keys, tile_cells))},
      {"values go to the other stage", "read before arrival",
       change(at(Kind::kLoad, kFullV), other_stage(all_values, tile_cells))},
      {"values complete on the barrier of the keys", "deadlock",
       change(at(Kind::kLoad, kFullV), [](Op& op) { op.barrier += kFullK - kFullV; })},
      {"keys are loaded before the wait for a free stage", "overwrite before release",
       trade(at(Kind::kWait, kFreeK), at(Kind::kLoad, kFullK))},
      {"the last tile of values is not loaded", "deadlock", drop_last(at(Kind::kLoad, kFullV))},
      {"the last tile of keys is neither expected nor loaded", "deadlock",
       [=](Program& p) { drop_last(at(Kind::kLoad, kFullK))(p), drop_last(at(Kind::kExpect, kFullK))(p); }},
      {"every tile of keys is the first one", "wrong tile", [=](Program& p) {
         uint64_t first = 0;
         change(at(Kind::kLoad, kFullK), [&](Op& op) { op.content = first ? first : (first = op.content); })(p);
       }},
      // What is made before all start.
      {"no proxy fence after the barriers are initialised", "proxy fence missing", drop(in(0, at(Kind::kProxy)))},
      {"no barrier of the block after the initialisation", "proxy fence missing", drop(at(Kind::kSync, 0, 1))},
      {"only the consumers pass the barrier of the block", "proxy fence missing", drop(in(0, at(Kind::kSync, 0, 1)))},
      {"the barrier of the block counts the consumers alone", "deadlock", change(at(Kind::kSync, 0, 1), value(256))},
      {"free keys count one consumer's warps", "read before arrival", change(at(Kind::kInit, kFreeK), value(4))},
      {"free values count one warp of each consumer", "barrier misuse", change(at(Kind::kInit, kFreeV), value(2))},
      {"free keys count a warp too many", "deadlock", change(at(Kind::kInit, kFreeK), value(9))},
      {"free queries count one consumer", "overwrite before release", change(at(Kind::kInit, kFreeQ, 1), value(1))},
      {"full values count an arrival for each consumer", "deadlock", change(at(Kind::kInit, kFullV), value(2))},
      {"a barrier is not initialised", "barrier misuse", drop(at(Kind::kInit, kFullV + 1, 1))},
      {"a barrier is initialised twice", "barrier misuse", change(at(Kind::kInit, kFreeK, 1), on(kFullK))},
      // The consumers wait.
      {"scores do not wait for keys", "read before arrival", drop(at(Kind::kWait, kFullK))},
      {"products do not wait for values", "read before arrival", drop(at(Kind::kWait, kFullV))},
      {"scores do not wait for queries", "read before arrival", drop(at(Kind::kWait, kFullQ, 1))},
      {"consumers wait for keys with the other parity", "read before arrival", change(at(Kind::kWait, kFullK), flip)},
      {"consumers wait for values with parity 0 for ever", "deadlock", change(at(Kind::kWait, kFullV), value(0))},
      {"consumers wait for queries with parity 0 for ever", "wrong phase",
       change(at(Kind::kWait, kFullQ, 1), value(0))},
      {"consumers wait for the keys of stage 0 alone", "wrong phase", change(at(Kind::kWait, kFullK), on(kFullK))},
      {"the wait for values comes after their product", "read before arrival", trade(at(Kind::kWait, kFullV), values)},
      // They let go.
      {"keys are not released", "deadlock", drop(at(Kind::kArrive, kFreeK))},
      {"values are not released", "deadlock", drop(at(Kind::kArrive, kFreeV))},
      {"the place of the queries is not released", "deadlock", drop(at(Kind::kArrive, kFreeQ, 1))},
      {"the second consumer does not release keys", "deadlock", drop(in(2, at(Kind::kArrive, kFreeK)))},
      {"one thread releases where four warps are counted", "deadlock", change(at(Kind::kArrive, kFreeK), value(1))},
      {"keys are released before the scores have ended", "overwrite before release",
       trade(at(Kind::kFinish), at(Kind::kArrive, kFreeK))},
      {"values are released before their product has ended", "overwrite before release",
       trade(at(Kind::kFinish), at(Kind::kArrive, kFreeV))},
      {"keys are released twice", "read before arrival", twice(at(Kind::kArrive, kFreeK))},
      {"the other stage of values is released", "deadlock",
       change(at(Kind::kArrive, kFreeV), [](Op& op) { op.barrier ^= 1; })},
      // Products.
      {"softmax does not wait for the scores", "registers in flight", drop(finish(1))},
      {"one group of products too many stays in flight before the output is corrected", "registers in flight",
       change(finish(0), value(1))},
      {"weights are packed before the product that reads the last ones has ended", "registers in flight",
       trade(finish(0), touch(2))},
      {"no wgmma fence", "wgmma fence missing", drop(at(Kind::kFence))},
      {"products are not committed", "registers in flight", drop(at(Kind::kCommit))},
      {"the last products are not awaited before the output is written", "registers in flight", drop_last(finish(0))},
      {"scores read the other stage of keys", "read before arrival",
       change(scores, other_stage(keys, tile_cells))},
      {"values read the other stage", "read before arrival", change(values, other_stage(all_values, tile_cells))},
      {"values read the keys of their stage", "read before arrival", change(values, [=](Op& op) {
         for (uint8_t& cell : op.cells) cell = uint8_t(cell - 2 * tile_cells);
       })},
      {"the second consumer takes the first one's queries", "wrong tile",
       change(in(2, scores), [=](Op& op) {
         for (uint8_t& cell : op.cells) cell = uint8_t(cell < query_cells ? cell - 8 : cell);
       })},
      // Turns.
      {"a turn counts the threads of one consumer", "barrier misuse", change(turns(Kind::kSync), value(128))},
      {"a consumer does not pass on its turn", "deadlock", drop(in(1, turns(Kind::kSignal)))},
      {"nobody has the first turn", "deadlock", [=](Program& p) {
         Trace& trace = p.traces[2];
         trace.erase(std::find_if(trace.begin(), trace.end(), [](const Op& op) { return op.kind == Kind::kSignal; }));
       }},
      {"both consumers wait for one turn", "barrier misuse", change(turns(Kind::kSync), on(1))},
      {"a consumer passes its turn to itself", "barrier misuse",
       change(turns(Kind::kSignal), [](Op& op) { op.barrier = 3 - op.barrier; })},
      {"turns are passed on but not awaited", "barrier misuse", drop(turns(Kind::kSync))},
      // The output.
      {"no proxy fence before the output is stored", "proxy fence missing",
       drop([](int role, const Op& op) { return role > 0 && op.kind == Kind::kProxy; })},
      {"the fence comes before the output is written", "proxy fence missing",
       trade(at(Kind::kPut), in(1, at(Kind::kProxy)))},
      {"no barrier between the output's writers and the thread that stores it", "proxy fence missing",
       drop_before(staging, Kind::kStore)},
      {"no barrier between the products with the queries and the output written in their place",
       "overwrite before release", drop_before(staging, Kind::kTouch)},
      {"the fence comes after that barrier", "proxy fence missing", trade(in(1, at(Kind::kProxy)), staging)},
      {"the barrier counts both consumers", "deadlock", change(staging, value(256))},
      {"queries are released before the stores have read", "overwrite before release",
       trade(at(Kind::kStored), at(Kind::kArrive, kFreeQ, 1))},
      {"stores are not awaited", "overwrite before release", drop(at(Kind::kStored))},
      {"the output is stored before it is written", "wrong tile", trade(at(Kind::kPut), at(Kind::kStore))},
      // Registers.
      {"the loader keeps its registers", "deadlock", drop(in(0, at(Kind::kRegisters)))},
      {"the consumers take more than the loader gave", "deadlock", change(in(2, at(Kind::kRegisters)), value(256))},
      {"the consumers take no more", "register budget", drop([](int role, const Op& op) {
         return role > 0 && op.kind == Kind::kRegisters;
       })},
      {"the loader gives up more than it may", "register budget", change(in(0, at(Kind::kRegisters)), value(-16))},
      {"a number of registers that is no multiple of 8", "register budget",
       change(in(1, at(Kind::kRegisters)), value(236))},
      {"dec where inc is meant", "register budget", change(in(1, at(Kind::kRegisters)), value(-240))},
  };
}

}  // namespace hopper
