// What TMA copies at once.
#pragma once

#include <cstring>
#include <vector>

#include "schedule.cuh"

namespace hopper {

constexpr uint32_t kBase = 3072;  // of shared memory

// Mistakes in what TMA is told, which no rule of the machine forbids: results must show them.
enum Flaw { kNone, kLoadsRunOn, kStoresRunOn, kHeadsFirst, kOneHead, kFlaws };
inline int flaw = kNone;

// A box of 64 columns, as "Tensor Access Modes" and "Swizzling Modes" have it.
struct Box {
  fastattn::Operand operand;
  fastattn::OperandMap map;
  uint32_t at;
  int64_t start[5];

  int lines() const { return map.box_heads * map.box_rows; }  // of 128 bytes, heads of a row adjacent
  void copy(std::vector<uint8_t>& memory, bool in) const {
    for (int line = 0; line < lines(); ++line) {
      const bool heads_first = flaw == kHeadsFirst && in;
      int head = heads_first ? line / map.box_rows : line % map.box_heads;
      const int row = heads_first ? line % map.box_rows : line / map.box_heads;
      if (flaw == kOneHead && in) head = 0;
      const int64_t place[] = {start[0], start[1] + head, start[2] + row, start[3], start[4]};
      bool inside = true;
      uintptr_t global = reinterpret_cast<uintptr_t>(map.base) + start[0] * 2;
      for (int i = 1; i < 5; ++i) {
        // All that there is of packed sequences: as many rows after an entry's end as that is before the last.
        const bool runs_on = i == 2 && map.size[4] == map.size[2] + 1 && flaw == (in ? kLoadsRunOn : kStoresRunOn);
        inside = inside && place[i] >= 0 && place[i] < (runs_on ? 2 * map.size[2] - start[4] : map.size[i]);
        global += uintptr_t(place[i] * map.stride[i - 1]);
      }
      auto* there = reinterpret_cast<uint8_t*>(global);
      for (int chunk = 0; chunk < 8; ++chunk) {
        uint8_t* here = &memory[at + line * 128 + (chunk ^ ((at / 128 + line) % 8)) * 16];
        if (!in && inside) std::memcpy(there + chunk * 16, here, 16);
        else if (in && inside) std::memcpy(here, there + chunk * 16, 16);
        else if (in) std::memset(here, 0, 16);
      }
    }
  }
  std::vector<uint8_t> cells() const {
    std::vector<uint8_t> cells;
    for (int i = 0; i < (lines() + 7) / 8; ++i) cells.push_back(uint8_t((at - kBase) / 1024 + i));
    return cells;
  }
  uint64_t content() const {
    uint64_t sum = uint64_t(operand);
    for (int64_t x : start) sum = (sum ^ uint64_t(x)) * 0x9E3779B97F4A7C15u;
    return sum ^ sum >> 31;
  }
};

}  // namespace hopper
