// The same for a backward pass (mutations.h): mistakes made in the operations of one with D = 64, in which keys stay.
#pragma once

#include "mutations.h"

namespace hopper {

inline std::vector<Mutation> pass_mutations() {
  constexpr int kFullOwn = 0, kFreeOwn = 1, kFull = 2, kFree = 5, kStages = 3;  // barriers, as passes.cuh numbers them
  constexpr int kOwn = 16, kPassing = 32, kTile = 8, kColumns = 80;              // cells: Y, stages, a tile, columns
  constexpr int kColumnBytes = 512;
  const auto flip = [](Op& op) { op.value ^= 1; };
  const auto value = [](int n) { return [=](Op& op) { op.value = n; }; };
  const auto scaled = [](int by, int of) { return [=](Op& op) { op.value = op.value * by / of; }; };
  const auto on = [](int barrier) { return [=](Op& op) { op.barrier = barrier; }; };
  const auto stages = [=](Kind kind, int first) { return at(kind, first, kStages); };
  const auto own = [](Kind kind, int barrier) { return at(kind, barrier, 1); };
  const Where columns = [=](int, const Op& op) { return op.kind == Kind::kLoad && op.value == kColumnBytes; };
  const Where scores = [](int, const Op& op) { return op.kind == Kind::kProduct && op.registers == 3; };
  const Where sums = [](int, const Op& op) { return op.kind == Kind::kProduct && op.registers == 60; };
  const Where staging = at(Kind::kSync, 4, 2);
  const auto finish = [](int n) {
    return [=](int, const Op& op) { return op.kind == Kind::kFinish && op.value == n; };
  };
  const auto touch = [](int mask) {
    return [=](int, const Op& op) { return op.kind == Kind::kTouch && op.registers & mask; };
  };
  const auto next_stage = [](Op& op) {
    for (uint8_t& cell : op.cells) {
      if (cell >= kColumns) cell = uint8_t(kColumns + (cell - kColumns + 1) % kStages);
      else if (cell >= kPassing) cell = uint8_t(kPassing + (cell - kPassing + 2 * kTile) % (2 * kTile * kStages));
    }
  };
  return {
      // The loader.
      {"passing rows are loaded without waiting for a free stage", "barrier misuse", drop(stages(Kind::kWait, kFree))},
      {"own rows are loaded without waiting for their place", "read before arrival",
       drop(own(Kind::kWait, kFreeOwn))},
      {"the loader waits for a free stage with the other parity", "deadlock", change(stages(Kind::kWait, kFree), flip)},
      {"the loader waits for the place of own rows with parity 1 for ever", "wrong phase",
       change(own(Kind::kWait, kFreeOwn), value(1))},
      {"a stage expects half its bytes", "deadlock", change(stages(Kind::kExpect, kFull), scaled(1, 2))},
      {"a stage expects twice its bytes", "deadlock", change(stages(Kind::kExpect, kFull), scaled(2, 1))},
      {"a stage does not expect its columns", "read before arrival",
       change(stages(Kind::kExpect, kFull), [](Op& op) { op.value -= kColumnBytes; })},
      {"own rows expect one operand", "read before arrival", change(own(Kind::kExpect, kFullOwn), scaled(1, 2))},
      {"columns are not loaded", "deadlock", drop(columns)},
      {"columns complete on the barrier of the own rows", "deadlock", change(columns, on(kFullOwn))},
      {"columns go to the next stage", "read before arrival", change(columns, next_stage)},
      {"columns of every tile are those of the first", "wrong tile", [=](Program& p) {
         uint64_t first = 0;
         change(columns, [&](Op& op) { op.content = first ? first : (first = op.content); })(p);
       }},
      {"passing rows go to the next stage", "read before arrival", change(stages(Kind::kLoad, kFull), next_stage)},
      {"dO goes to the place of Q", "overwrite before release", change(stages(Kind::kLoad, kFull), [](Op& op) {
         for (uint8_t& cell : op.cells) {
           if (cell < kColumns) cell = uint8_t(cell / (2 * kTile) * 2 * kTile + cell % kTile);
         }
       })},
      {"V goes to the place of K", "overwrite before release", change(own(Kind::kLoad, kFullOwn), [](Op& op) {
         for (uint8_t& cell : op.cells) cell = uint8_t(cell % kOwn);
       })},
      {"the loader forgets to expect a stage", "deadlock", drop(stages(Kind::kExpect, kFull))},
      {"a stage is expected twice", "barrier misuse", twice(stages(Kind::kExpect, kFull))},
      {"columns are loaded before the wait for a free stage", "overwrite before release",
       trade(stages(Kind::kWait, kFree), columns)},
      {"the last columns are not loaded", "deadlock", drop_last(columns)},
      // What is made before all start.
      {"no proxy fence after the barriers are initialised", "proxy fence missing", drop(in(0, at(Kind::kProxy)))},
      {"no barrier of the block after the initialisation", "proxy fence missing", drop(own(Kind::kSync, 0))},
      {"a free stage counts one consumer's warps", "overwrite before release", change(stages(Kind::kInit, kFree), value(4))},
      {"a free stage counts a warp too many", "deadlock", change(stages(Kind::kInit, kFree), value(9))},
      {"the free place of own rows counts one consumer", "read before arrival",
       change(own(Kind::kInit, kFreeOwn), value(1))},
      {"a full stage counts a second arrival", "deadlock", change(stages(Kind::kInit, kFull), value(2))},
      // The consumers wait.
      {"scores do not wait for passing rows", "read before arrival", drop(stages(Kind::kWait, kFull))},
      {"scores do not wait for own rows", "read before arrival", drop(own(Kind::kWait, kFullOwn))},
      {"consumers wait for a stage with the other parity", "read before arrival",
       change(stages(Kind::kWait, kFull), flip)},
      {"consumers wait for stage 0 alone", "wrong phase", change(stages(Kind::kWait, kFull), on(kFull))},
      {"consumers wait for own rows with parity 0 for ever", "wrong phase",
       change(own(Kind::kWait, kFullOwn), value(0))},
      // They let go.
      {"a stage is not released", "deadlock", drop(stages(Kind::kArrive, kFree))},
      {"the second consumer does not release a stage", "deadlock", drop(in(2, stages(Kind::kArrive, kFree)))},
      {"one thread releases where four warps are counted", "deadlock", change(stages(Kind::kArrive, kFree), value(1))},
      {"a stage is released before its sums have ended", "overwrite before release",
       trade(at(Kind::kFinish), stages(Kind::kArrive, kFree))},
      {"a stage is released twice", "overwrite before release", twice(stages(Kind::kArrive, kFree))},
      {"the stage of the next tile is released", "deadlock",
       change(stages(Kind::kArrive, kFree), [](Op& op) { op.barrier = kFree + (op.barrier - kFree + 1) % kStages; })},
      {"a stage is released before its columns are read", "overwrite before release", [=](Program& p) {
         for (int role = 1; role < kRoles; ++role) {
           Trace& trace = p.traces[role];
           for (size_t i = trace.size(); i-- > 0;) {
             if (trace[i].kind != Kind::kGet) continue;
             const int stage = trace[i].cells[0] - kColumns;
             for (size_t after = i; after < trace.size(); ++after) {
               if (trace[after].kind != Kind::kArrive || trace[after].barrier != kFree + stage) continue;
               std::rotate(trace.begin() + i, trace.begin() + i + 1, trace.begin() + after + 1);
               break;
             }
           }
         }
       }},
      {"the place of own rows is not released", "deadlock", drop(own(Kind::kArrive, kFreeOwn))},
      // Products.
      {"weights do not wait for the scores", "registers in flight", drop(finish(1))},
      {"one group of products too many stays in flight before weights are packed", "registers in flight",
       change(finish(0), value(1))},
      {"weights are packed before the sums that read the last ones have ended", "registers in flight",
       trade(finish(0), touch(12))},
      {"no wgmma fence", "wgmma fence missing", drop(at(Kind::kFence))},
      {"products are not committed", "registers in flight", drop(at(Kind::kCommit))},
      {"the last sums are not awaited before they are written", "registers in flight", drop_last(finish(0))},
      {"scores read the next stage", "read before arrival", change(scores, next_stage)},
      {"sums read the next stage", "wrong tile", change(sums, next_stage)},
      {"sums read dO where Q is meant", "wrong tile", change(sums, [](Op& op) {
         for (uint8_t& cell : op.cells) cell = uint8_t(cell / (2 * kTile) * 2 * kTile + kTile + cell % kTile);
       })},
      {"the second consumer takes the first one's rows", "wrong tile", change(in(2, scores), [](Op& op) {
         for (uint8_t& cell : op.cells) cell = uint8_t(cell < kPassing ? cell / kOwn * kOwn + cell % kTile : cell);
       })},
      {"columns are read before the wait for their stage", "read before arrival",
       trade(stages(Kind::kWait, kFull), at(Kind::kGet))},
      {"columns are read from the next stage", "read before arrival", change(at(Kind::kGet), next_stage)},
      // The sums.
      {"no proxy fence before the sums are stored", "proxy fence missing",
       drop([](int role, const Op& op) { return role > 0 && op.kind == Kind::kProxy; })},
      {"no barrier between the writers of the sums and the thread that stores them", "proxy fence missing",
       drop_before(staging, Kind::kStore)},
      {"no barrier between the products with own rows and the sums written in their place", "overwrite before release",
       drop_before(staging, Kind::kTouch)},
      {"the fence comes after that barrier", "proxy fence missing", trade(in(1, at(Kind::kProxy)), staging)},
      {"own rows are released before the stores have read", "overwrite before release",
       trade(at(Kind::kStored), own(Kind::kArrive, kFreeOwn))},
      {"stores are not awaited", "overwrite before release", drop(at(Kind::kStored))},
      // Registers.
      {"the loader keeps its registers", "deadlock", drop(in(0, at(Kind::kRegisters)))},
      {"the consumers take more than the loader gave", "deadlock", change(in(2, at(Kind::kRegisters)), value(256))},
      {"the loader gives up more than it may", "register budget", change(in(0, at(Kind::kRegisters)), value(-16))},
      {"a number of registers that is no multiple of 8", "register budget",
       change(in(1, at(Kind::kRegisters)), value(236))},
      {"dec where inc is meant", "register budget", change(in(1, at(Kind::kRegisters)), value(-240))},
  };
}

}  // namespace hopper
