// All orders in which the roles of a block and TMA can proceed, or many of them at random.
//
// A role's operations do not depend on the order, so they were recorded once (machine.h), and only their interleaving
// is explored: by depth-first search, where a state that was met before is not entered again. Between two operations
// that another role can notice, a role runs on.
#pragma once

#include <cstring>
#include <map>
#include <random>
#include <unordered_set>

#include "state.h"

namespace hopper {

struct Program {
  int groups = 0;  // warp groups of the block
  std::array<Trace, kRoles> traces;
  std::array<int, kRoles> needed{};
  std::array<std::vector<int>, kMbarriers> loads;  // bytes of each load, by the mbarrier it completes on
  std::vector<int> weights;
  std::vector<std::string> barriers;  // names

  // Merge cells that every operation treats alike, and count loads. After all changes to the traces.
  void complete() {
    std::map<int, std::vector<int>> members;  // cell -> operations
    int number = 0;
    for (Trace& trace : traces) {
      for (Op& op : trace) {
        for (uint8_t cell : op.cells) members[cell].push_back(number);
        ++number;
      }
    }
    std::map<std::vector<int>, int> classes;
    std::map<int, int> of;
    for (const auto& [cell, operations] : members) {
      const auto found = classes.emplace(operations, int(classes.size())).first;
      of[cell] = found->second;
      weights.resize(classes.size());
      ++weights[found->second];
    }
    for (Trace& trace : traces) {
      for (Op& op : trace) {
        std::vector<uint8_t> merged;
        for (uint8_t cell : op.cells) merged.push_back(uint8_t(of[cell]));
        std::sort(merged.begin(), merged.end());
        merged.erase(std::unique(merged.begin(), merged.end()), merged.end());
        op.cells = merged;
        if (op.kind == Kind::kLoad) loads[op.barrier].push_back(op.value);
      }
    }
  }
};

struct Outcome {
  bool found = false, all = true;  // a report; every order was explored
  Report report;
  long states = 0;
  std::string schedule;
};

// `kClasses`: cells of shared memory that the operations distinguish, at most.
template <int kClasses>
class Explorer {
 public:
  explicit Explorer(Program& program) : program_(program) {
    if (program.weights.size() > kClasses) throw Report{"model", "too many kinds of cells"};
  }

  // Depth first, up to `limit` states.
  Outcome search(long limit) {
    Outcome outcome;
    std::vector<Frame> stack = {{Machine(program_.groups)}};
    std::unordered_set<uint64_t> met;
    try {
      begin(stack[0].state);
      while (!stack.empty()) {
        Frame& frame = stack.back();
        int action = frame.next;
        while (action < kActions && !can(frame.state, action)) ++action;
        if (action == kActions) {
          if (frame.next == 0) finished(frame.state);
          stack.pop_back();
          continue;
        }
        frame.next = action + 1;
        stack.push_back({frame.state, 0});
        path_ = &stack;
        act(stack.back().state, action);
        if (!met.insert(hash(stack.back().state)).second) stack.pop_back();
        if (long(met.size()) >= limit) {
          outcome.all = false;
          break;
        }
      }
    } catch (const Report& report) {
      outcome.found = true;
      outcome.report = report;
      for (size_t i = 0; i + 1 < stack.size(); ++i) outcome.schedule += line(stack[i].state, stack[i].next - 1);
    }
    outcome.states = long(met.size());
    return outcome;
  }

  // One order at random. `lazy` of 8 times the same one goes on, so that long waits occur too.
  Outcome wander(uint64_t seed) {
    Outcome outcome;
    outcome.all = false;
    std::mt19937_64 random(seed);
    const unsigned lazy = seed % 8;
    auto now = std::make_unique<Machine>(program_.groups);
    try {
      begin(*now);
      for (int last = 0;;) {
        std::vector<int> actions;
        for (int action = 0; action < kActions; ++action) {
          if (can(*now, action)) actions.push_back(action);
        }
        if (actions.empty()) break;
        const bool goes_on = random() % 8 < lazy && can(*now, last);
        last = goes_on ? last : actions[random() % actions.size()];
        outcome.schedule += line(*now, last);
        act(*now, last);
        ++outcome.states;
      }
      finished(*now);
      outcome.schedule.clear();
    } catch (const Report& report) {
      outcome.found = true;
      outcome.report = report;
    }
    return outcome;
  }

 private:
  using Machine = State<kClasses>;
  static constexpr int kActions = kRoles + kMbarriers;  // a role goes on; TMA delivers on an mbarrier
  struct Frame {
    Machine state;
    int next = 0;
  };
  Program& program_;
  const std::vector<Frame>* path_ = nullptr;

  Trace& trace(int role) { return program_.traces[role]; }

  void begin(Machine& now) {
    for (size_t i = 0; i < program_.weights.size(); ++i) now.cells[i].weight = uint32_t(program_.weights[i]);
    for (int role = 0; role < kRoles; ++role) {
      now.roles[role].needed = int16_t(program_.needed[role]);
      run_on(now, role);
    }
  }

  void run_on(Machine& now, int role) {
    uint16_t& position = now.roles[role].position;
    for (; position < trace(role).size() && !visible(trace(role)[position].kind); ++position) {
      now.step(role, trace(role)[position]);
    }
  }

  bool can(const Machine& now, int action) {
    if (action < kRoles) {
      const size_t position = now.roles[action].position;
      return position < trace(action).size() && now.enabled(action, trace(action)[position]);
    }
    const Mbarrier& barrier = now.mbarriers[action - kRoles];
    return barrier.issued > barrier.delivered;
  }

  void act(Machine& now, int action) {
    if (action < kRoles) {
      if (!now.step(action, trace(action)[now.roles[action].position])) return;
      ++now.roles[action].position;
      run_on(now, action);
    } else {
      // All that is under way there, up to the end of a phase: before that nobody can tell.
      const int number = action - kRoles;
      const Mbarrier& barrier = now.mbarriers[number];
      const int phase = barrier.phase;
      do now.deliver(number, program_.loads[number][barrier.delivered]);
      while (barrier.phase == phase && barrier.issued > barrier.delivered);
    }
  }

  void finished(const Machine& now) {
    std::string waiting;
    for (int role = 0; role < kRoles; ++role) {
      const size_t position = now.roles[role].position;
      if (position < trace(role).size()) {
        waiting += (waiting.empty() ? "" : "; ") + name(role) + ": " + text(trace(role)[position], program_.barriers);
      }
    }
    if (!waiting.empty()) throw Report{"deadlock", waiting};
    now.end();
  }

  static std::string name(int role) { return role == 0 ? "loader" : "group " + std::to_string(role - 1); }

  std::string line(const Machine& now, int action) {
    if (action >= kRoles) return "TMA: deliver on " + program_.barriers[action - kRoles] + "\n";
    return name(action) + ": " + text(trace(action)[now.roles[action].position], program_.barriers) + "\n";
  }

  static uint64_t hash(const Machine& now) {
    static_assert(std::is_trivially_copyable_v<Machine> && sizeof(Machine) % 8 == 0);
    uint64_t sum = 0, word;
    const auto* bytes = reinterpret_cast<const char*>(&now);
    for (size_t i = 0; i + 8 <= sizeof(Machine); i += 8) {
      std::memcpy(&word, bytes + i, 8);
      sum = (sum ^ word) * 0x9E3779B97F4A7C15u;
      sum ^= sum >> 29;
    }
    return sum;
  }
};

}  // namespace hopper
