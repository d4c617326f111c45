// What one role of a block does, as a list of operations: the loader's warp, and each warp group that computes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hopper {

constexpr int kRoles = 4;  // 0 loads, the others compute; what is not there has no operations
constexpr int kRoleThreads = 128;

enum class Kind : uint8_t {
  kInit,       // mbarrier, value: arrivals of a phase
  kExpect,     // mbarrier, value: bytes; arrives too
  kArrive,     // mbarrier, value: how many arrivals
  kWait,       // mbarrier, value: parity
  kLoad,       // TMA, into `cells`, completing on mbarrier, value: bytes
  kStore,      // TMA, from `cells`
  kStored,     // what the stores read has been read
  kPut,        // ordinary stores of all threads to `cells`
  kGet,        // ordinary loads of all threads from `cells`
  kProxy,      // fence.proxy.async by the threads that wrote
  kSync,       // named barrier, value: threads
  kSignal,     // the same without waiting
  kRegisters,  // setmaxnreg, value: per thread, negative: dec
  kFence,      // wgmma.fence
  kProduct,    // wgmma: reads `cells` and `registers`
  kCommit,     // wgmma.commit_group
  kFinish,     // wgmma.wait_group, value: groups that may remain
  kTouch,      // ordinary use of `registers`
};

struct Op {
  Kind kind;
  int barrier = 0;
  int value = 0;
  int registers = 0;           // a bit for each array of registers
  std::vector<uint8_t> cells = {};  // numbers of 1024 bytes of shared memory
  uint64_t content = 0;        // of what is written; of what must be read: the sum over its cells
};

using Trace = std::vector<Op>;

// Whether another role can notice when it happens: only there does the order of roles matter.
inline bool visible(Kind kind) {
  return kind == Kind::kExpect || kind == Kind::kArrive || kind == Kind::kWait || kind == Kind::kSync ||
         kind == Kind::kSignal || kind == Kind::kRegisters;
}

inline std::string text(const Op& op, const std::vector<std::string>& barriers) {
  const auto barrier = [&] { return op.barrier < int(barriers.size()) ? barriers[op.barrier] : "?"; };
  const std::string id = std::to_string(op.barrier), value = std::to_string(op.value);
  switch (op.kind) {
    case Kind::kInit: return "init " + barrier() + " for " + value;
    case Kind::kExpect: return "expect " + value + " bytes on " + barrier();
    case Kind::kArrive: return "arrive " + value + " on " + barrier();
    case Kind::kWait: return "wait " + barrier() + " parity " + value;
    case Kind::kLoad: return "load on " + barrier();
    case Kind::kStore: return "store";
    case Kind::kStored: return "wait for stores";
    case Kind::kPut: return "write shared memory";
    case Kind::kGet: return "read shared memory";
    case Kind::kProxy: return "proxy fence";
    case Kind::kSync: return "bar.sync " + id + ", " + value;
    case Kind::kSignal: return "bar.arrive " + id + ", " + value;
    case Kind::kRegisters: return "setmaxnreg " + value;
    case Kind::kFence: return "wgmma fence";
    case Kind::kProduct: return "wgmma";
    case Kind::kCommit: return "wgmma commit";
    case Kind::kFinish: return "wgmma wait " + value;
    case Kind::kTouch: return "use registers";
  }
  return "?";
}

}  // namespace hopper
