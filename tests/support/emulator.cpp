// The kernels without a GPU: csrc/cuda/forward.cuh and backward.cuh on a model of the hardware (hopper/), behind the C
// interface of the library. What breaks a rule of the machine is an error of the call, which names it.
#include <cstdlib>
#include <cstring>

#include "hopper/machine.h"
#include "hopper/pass_mutations.h"
#include "library.cuh"

namespace fastattn {

static uint64_t seed = 0;
static int most_blocks = 2;
static std::vector<hopper::Program> recorded;  // of the last call's kernels, their first blocks
static int query_cells, tile_cells;
static bool backward;  // of the last call

static std::vector<hopper::Mutation> mutations() {
  return backward ? hopper::pass_mutations() : hopper::mutations(query_cells, tile_cells);
}

static void name_stage(hopper::Program& program, int barrier, const char* what, int stage) {
  program.barriers[barrier] = what + std::string("[") + std::to_string(stage) + "]";
}

// Every block of a kernel, one after the other; `body(machine, role)` is what a role does.
template <class S, class Own, class Call, class Body>
static void run(const Call& plan, Body body) {
  const int blocks = std::min(plan.works, most_blocks);
  for (int number = 0; number < blocks; ++number) {
    const bool half = plan.f.dtype == FASTATTN_FLOAT16;
    hopper::Block block(half, number, blocks, 1 + S::kConsumers, S::kBarrierPlace, seed + number);
    std::vector<hopper::Machine<S, Own, Call>> machines;
    machines.reserve(block.groups);
    std::vector<std::function<void()>> bodies;
    for (int role = 0; role < block.groups; ++role) {
      machines.emplace_back(block, plan, role);
      bodies.push_back([&body, role, &machine = machines.back()] { body(machine, role); });
    }
    block.run(bodies);
    if (number > 0) continue;
    hopper::Program program;
    program.groups = block.groups;
    program.traces = block.traces;
    for (int role = 0; role < block.groups; ++role) program.needed[role] = block.state.roles[role].needed;
    program.barriers.resize(S::kBarriers);
    recorded.push_back(program);
  }
}

template <class S>
static void run(const FastattnForward& f) {
  const Plan plan = make_plan(f);
  run<S, Registers<S, hopper::Tracked>>(plan, [&](auto& machine, int role) { attend<S>(machine, plan, role); });
  hopper::Program& program = recorded.back();
  program.barriers[S::kFullQueries] = "full q";
  program.barriers[S::kFreeQueries] = "free q";
  for (int s = 0; s < S::kStages; ++s) {
    name_stage(program, S::full_keys(s), "full k", s);
    name_stage(program, S::free_keys(s), "free k", s);
    name_stage(program, S::full_values(s), "full v", s);
    name_stage(program, S::free_values(s), "free v", s);
  }
  query_cells = S::kQueryBytes / 1024;
  tile_cells = S::kTileBytes / 1024;
}

template <int D, Pass kPass>
static void run(const FastattnBackward& b) {
  using S = PassShape<D, kPass>;
  const PassPlan plan = make_plan<S>(b);
  if (plan.works == 0) return;
  run<S, PassRegisters<S, hopper::Tracked>>(plan, [&](auto& machine, int role) { run_pass<S>(machine, plan, role); });
  hopper::Program& program = recorded.back();
  program.barriers[S::kFullOwn] = "full own";
  program.barriers[S::kFreeOwn] = "free own";
  for (int s = 0; s < S::kStages; ++s) {
    name_stage(program, S::full(s), "full", s);
    name_stage(program, S::free(s), "free", s);
  }
}

template <int D>
static void run(const FastattnBackward& b) {
  using S = PassShape<D, kQueriesAlone>;
  const PassPlan plan = make_plan<S>(b);
  for (int64_t index = 0; index < count_row_works(b.f); ++index) {
    hopper::Block block(b.f.dtype == FASTATTN_FLOAT16, 0, 1, 2, 0, 0);
    hopper::Machine<S, RowRegisters, PassPlan> machine(block, plan, 1);
    prepare_rows(machine, b, int(index));
  }
  if constexpr (D > 64) {
    run<D, kKeysAlone>(b);
    run<D, kValuesAlone>(b);
  } else {
    run<D, kKeysAndValues>(b);
  }
  run<D, kQueriesAlone>(b);
}

template <class Call>
static int emulate(const Call& call, const FastattnForward& f) {
  if (f.device < 0) return fail(FASTATTN_CUDA_ERROR, "CUDA: %s", "invalid device ordinal");
  try {
    recorded.clear();
    backward = std::is_same_v<Call, FastattnBackward>;
    if constexpr (std::is_same_v<Call, FastattnForward>) {
      f.head_dim == 64 ? run<Shape<64>>(f) : f.head_dim == 128 ? run<Shape<128>>(f) : run<Shape<256>>(f);
    } else {
      f.head_dim == 64 ? run<64>(call) : f.head_dim == 128 ? run<128>(call) : run<256>(call);
    }
  } catch (const hopper::Report& report) {
    return fail(FASTATTN_CUDA_ERROR, "model: %s: %s", report.kind.c_str(), report.text.c_str());
  }
  return FASTATTN_OK;
}

int launch(const FastattnForward& f) { return emulate(f, f); }
int launch(const FastattnBackward& b) { return emulate(b, b.f); }

}  // namespace fastattn

extern "C" {

void emulator_seed(uint64_t seed) { fastattn::seed = seed; }
void emulator_blocks(int most) { fastattn::most_blocks = most; }
// Make a mistake in what TMA is told from here on; 0 none. The number of them and of none.
int emulator_flaw(int flaw) {
  hopper::flaw = flaw;
  return hopper::kFlaws;
}

// Explore the first block of kernel `kernel` of the last call: with mutation `mutation` or, below 0, as it is; up to
// `limit` states by search, or for a seed of 0 and more one order at random. The kind of report, the states, whether these
// are all, the report and the schedule that led to it, separated by tabs.
const char* emulator_explore(int kernel, int mutation, long limit, long seed) {
  static std::string text;
  hopper::Program program = fastattn::recorded.at(kernel);
  hopper::Outcome outcome;
  try {
    if (mutation >= 0) fastattn::mutations().at(mutation).make(program);
    program.complete();
    const auto explore = [&](auto explorer) {
      return seed < 0 ? explorer.search(limit) : explorer.wander(uint64_t(seed));
    };
    outcome = program.weights.size() <= 24 ? explore(hopper::Explorer<24>(program))
                                           : explore(hopper::Explorer<64>(program));
  } catch (const hopper::Report& report) {
    outcome.found = true;
    outcome.report = report;
  }
  text = outcome.report.kind + "\t" + std::to_string(outcome.states) + "\t" + (outcome.all ? "all" : "some") + "\t" +
         outcome.report.text + "\t" + outcome.schedule;
  return text.c_str();
}
int emulator_kernels() { return int(fastattn::recorded.size()); }

// Its mistake, for the last call's pass, and the report it must give, separated by a tab; empty past the last one.
const char* emulator_mutation(int number) {
  static std::string text;
  const auto all = fastattn::mutations();
  text = number < int(all.size()) ? std::string(all[number].mistake) + "\t" + all[number].report : "";
  return text.c_str();
}

// csrc/cuda/layout.cuh and schedule.cuh, for the tests
uint32_t layout_tile_offset(int rows, int row, int chunk) { return fastattn::tile_offset(rows, row, chunk); }
uint64_t layout_row_descriptor(uint32_t tile, int rows, int row, int k) {
  return fastattn::row_descriptor(tile, rows, row, k);
}
uint64_t layout_value_descriptor(uint32_t tile, int keys, int k) { return fastattn::value_descriptor(tile, keys, k); }
int layout_fragment_row(int t, int i) { return fastattn::fragment_row(t, i); }
int layout_fragment_column(int t, int i) { return fastattn::fragment_column(t, i); }
int layout_operand_row(int t, int j) { return fastattn::operand_row(t, j); }
int layout_operand_column(int t, int j) { return fastattn::operand_column(t, j); }
// first and end of what a row sees; of the tiles that a block visits
void schedule_visible_keys(const FastattnForward* f, int row, int* range) {
  const fastattn::Range r = fastattn::visible_keys(*f, fastattn::extent_of(*f, 0), row);
  range[0] = r.begin, range[1] = r.end;
}
void schedule_key_tiles(const FastattnForward* f, int first, int* range) {
  using namespace fastattn;
  const Extent e = extent_of(*f, 0);
  const int rows = block_rows(f->head_dim);
  const Range r = f->head_dim == 64    ? key_tiles<Shape<64>>(*f, e, first, rows)
                  : f->head_dim == 128 ? key_tiles<Shape<128>>(*f, e, first, rows)
                                       : key_tiles<Shape<256>>(*f, e, first, rows);
  range[0] = r.begin, range[1] = r.end;
}
int schedule_section_heads(const FastattnForward* f) { return fastattn::section_heads(*f); }
int layout_block_rows(int head_dim) { return fastattn::block_rows(head_dim); }
int schedule_heads_of_tile(const FastattnForward* f) { return fastattn::heads_of_tile(*f); }
// (batch entry, head, head of k and v, first row or -1 if it has none, tiles) of a work at head dim 128, in sections of
// `section` tiles of heads, 0 for the plan's own; the number of works
int schedule_work(const FastattnForward* f, int section, int index, int* work) {
  fastattn::Plan plan = fastattn::make_plan(*f);
  if (section > 0) plan.section = section;
  const fastattn::Work w = fastattn::work_at<fastattn::Shape<128>>(plan, index);
  const int values[] = {w.entry, w.head, w.kv_head, w.empty() ? -1 : w.first, w.tiles};
  std::memcpy(work, values, sizeof values);
  return plan.works;
}
}
