// The forward kernel without a GPU: csrc/cuda/forward.cuh on a model of the hardware, behind the library's own C interface.
//
// What the instructions do is written here a second time, from the PTX ISA and independently of csrc/cuda/layout.cuh: how
// a descriptor addresses shared memory, where the elements of a fragment are. Shared memory starts as NaN. Copies are
// carried out either when issued or only when they must have arrived, so that a missing wait or a tile overwritten too
// early shows as a wrong result in one of the two.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "forward.cuh"

namespace fastattn {

bool late_copies = false;

float widen(uint16_t bits, bool half) {
  float value;
  if (half) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
  }
  const uint32_t wide = uint32_t(bits) << 16;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t narrow(float value, bool half) {
  uint16_t bits;
  if (half) {
    const _Float16 x = _Float16(value);
    std::memcpy(&bits, &x, 2);
    return bits;
  }
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (value != value) return 0x7FFF;
  return uint16_t((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);  // to nearest, ties to even
}

template <int D>
struct Emulator {
  struct Copy {
    uint32_t to;
    const uint16_t* from;
    bool inside;
  };
  static constexpr uint32_t kBase = 3072, kTileBytes = kRows * D * 2;
  bool half;
  std::vector<Registers<D>> threads{kThreads};
  std::vector<uint8_t> memory = std::vector<uint8_t>(kBase + (1 + 2 * kStages) * kTileBytes, 0xFF);
  std::vector<std::vector<Copy>> groups_of_copies{1};

  explicit Emulator(bool half) : half(half) {
    std::memset(threads.data(), 0xFF, kThreads * sizeof threads[0]);
    for (int i = 0; i < kThreads; ++i) threads[i].index = i;
  }

  template <class F>
  void each(F f) {
    for (auto& thread : threads) f(thread);
  }
  template <class F>
  void groups(F f) {
    for (int group = 0; group < kGroups; ++group) f(group);
  }
  uint32_t tile(int i) const { return kBase + i * kTileBytes; }

  void carry_out(const Copy& copy) {
    if (copy.to < kBase || copy.to + 16 > memory.size() || copy.to % 16 != 0) std::abort();
    if (copy.inside) std::memcpy(&memory[copy.to], copy.from, 16);
    else std::memset(&memory[copy.to], 0, 16);
  }
  void copy(uint32_t to, const uint16_t* from, bool inside) {
    if (late_copies) groups_of_copies.back().push_back({to, from, inside});
    else carry_out({to, from, inside});
  }
  void committed() { groups_of_copies.emplace_back(); }
  template <int N>
  void arrived(std::integral_constant<int, N>) {
    for (; groups_of_copies.size() > N + 1; groups_of_copies.erase(groups_of_copies.begin())) {
      for (const auto& copy : groups_of_copies.front()) carry_out(copy);
    }
  }
  void begin() {}
  void end() {}

  float element(uint32_t address) const {
    const uint32_t row = address / 128 % 8, chunk = address / 16 % 8;
    const uint32_t swizzled = address - chunk * 16 + (chunk ^ row) * 16;
    uint16_t bits;
    std::memcpy(&bits, &memory.at(swizzled), 2);
    return widen(bits, half);
  }
  static uint32_t field(uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3FFF) * 16; }
  // Rows by 16 columns, the columns adjacent.
  float k_major(uint64_t descriptor, int row, int column) const {
    if (descriptor >> 62 != 1) std::abort();
    return element(field(descriptor, 0) + row / 8 * field(descriptor, 32) + row % 8 * 128 + column * 2);
  }
  // The same of a matrix that is stored transposed, 64 rows adjacent.
  float mn_major(uint64_t descriptor, int row, int column) const {
    if (descriptor >> 62 != 1) std::abort();
    return element(field(descriptor, 0) + row / 64 * field(descriptor, 16) + row % 64 * 2 +
                   column / 8 * field(descriptor, 32) + column % 8 * 128);
  }

  void scores(int group, uint64_t a, uint64_t b, bool add) {
    static float left[64][16], right[128][16];
    for (int row = 0; row < 64; ++row)
      for (int i = 0; i < 16; ++i) left[row][i] = k_major(a, row, i);
    for (int row = 0; row < 128; ++row)
      for (int i = 0; i < 16; ++i) right[row][i] = k_major(b, row, i);
    multiply(group, left, right, 64, [](auto& t) { return t.s; }, add);
  }
  void values(int group, int k, uint64_t b) {
    static float left[64][16], right[D][16];
    for (int lane = 0; lane < 128; ++lane) {
      const int row = lane / 32 * 16 + lane % 32 / 4, column = lane % 4 * 2;
      for (int j = 0; j < 8; ++j) {  // a0 to a7: two per register; rows alternate every two, columns every four
        const uint32_t both = threads[group * 128 + lane].p[4 * k + j / 2];
        left[row + (j / 2 % 2 ? 8 : 0)][column + (j >= 4 ? 8 : 0) + j % 2] = widen(both >> (j % 2 * 16), half);
      }
    }
    for (int row = 0; row < D; ++row)
      for (int i = 0; i < 16; ++i) right[row][i] = mn_major(b, row, i);
    multiply(group, left, right, D / 2, [](auto& t) { return t.o; }, true);
  }
  template <class Right, class F>
  void multiply(int group, const float (&left)[64][16], const Right& right, int elements, F accumulator, bool add) {
    for (int lane = 0; lane < 128; ++lane) {
      float* d = accumulator(threads[group * 128 + lane]);
      for (int i = 0; i < elements; ++i) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + (i % 4 >= 2 ? 8 : 0);
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = add ? d[i] : 0.0f;
        for (int n = 0; n < 16; ++n) sum += left[row][n] * right[column][n];
        d[i] = sum;
      }
    }
  }

  template <class Array, class Op>
  void quads(Array array, Op op) {
    for (int first = 0; first < kThreads; first += 4) {
      for (int r = 0; r < 2; ++r) {
        float result = array(threads[first])[r];
        for (int i = 1; i < 4; ++i) result = op(result, array(threads[first + i])[r]);
        for (int i = 0; i < 4; ++i) array(threads[first + i])[r] = result;
      }
    }
  }
  void quad_max() {
    quads([](auto& t) { return t.peak; }, [](float a, float b) { return fmaxf(a, b); });
  }
  void quad_sum() {
    quads([](auto& t) { return t.sum; }, [](float a, float b) { return a + b; });
  }
  float exp2(float x) { return exp2f(x); }
  float log2(float x) { return log2f(x); }
  uint32_t pack(float low, float high) { return narrow(low, half) | uint32_t(narrow(high, half)) << 16; }
};

template <int D>
void run(const FastattnForward& f, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block) {
    Emulator<D> emulator(f.dtype == FASTATTN_FLOAT16);
    attend<D>(emulator, f, block);
  }
}

int launch(const FastattnForward& f, int64_t blocks) {
  if (f.device < 0) return fail(FASTATTN_CUDA_ERROR, "CUDA: %s", "invalid device ordinal");
  f.head_dim == 64 ? run<64>(f, blocks) : run<128>(f, blocks);
  return FASTATTN_OK;
}

}  // namespace fastattn

extern "C" {
void emulator_late_copies(bool late) { fastattn::late_copies = late; }

// csrc/cuda/layout.cuh, for the tests
uint32_t layout_tile_offset(int row, int chunk) { return fastattn::tile_offset(row, chunk); }
uint64_t layout_row_descriptor(uint32_t tile, int row, int k) { return fastattn::row_descriptor(tile, row, k); }
uint64_t layout_value_descriptor(uint32_t tile, int k) { return fastattn::value_descriptor(tile, k); }
int layout_fragment_row(int t, int i) { return fastattn::fragment_row(t, i); }
int layout_fragment_column(int t, int i) { return fastattn::fragment_column(t, i); }
int layout_operand_row(int t, int j) { return fastattn::operand_row(t, j); }
int layout_operand_column(int t, int j) { return fastattn::operand_column(t, j); }
int layout_visible_keys(int row, int kv_len, bool causal, int64_t q_offset) {
  return fastattn::visible_keys(row, kv_len, causal, q_offset);
}
int layout_first_row(int64_t block, int q_len) { return fastattn::first_row(block, q_len); }
int layout_key_tiles(int first, int q_len, int kv_len, bool causal, int64_t q_offset) {
  return fastattn::key_tiles(first, q_len, kv_len, causal, q_offset);
}
}
