// The steps of a layer in training between its matrix products: RMS norm, gated activations, and their gradients.
#include <cstring>

#include "exponential.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int64_t kTaskElements = 1 << 14;
// Sums are made block by block, which keeps the accuracy of float32.
constexpr int64_t kBlock = 1 << 9;  // elements of a row
constexpr int64_t kTaskRows = 64;

template <class Element>
inline float at(const Element* x, int64_t i) {
  return widen<float>(x[i]);
}

// With r = 1 / sqrt(mean(x^2) + eps) and g = weight dy: dx = r g - x r^3 mean(g x), and dy x r is this row's part of dweight.
template <class Element>
void norm_row(Element* dx, float* dweight, const Element* x, const Element* weight, const Element* dy, int64_t width, float eps) {
  constexpr int kL = kLanes<float>;
  const int64_t whole = width / kL * kL;
  Vec<float> squares{}, products{};
  int64_t k = 0;
  while (k < whole) {
    const int64_t end = k + kBlock < whole ? k + kBlock : whole;
    Vec<float> square{}, product{};
    for (; k < end; k += kL) {
      const Vec<float> some = load<float>(x + k);
      square += some * some;
      product += some * load<float>(dy + k) * load<float>(weight + k);
    }
    squares += square;
    products += product;
  }
  float square = sum_lanes(squares), product = sum_lanes(products);
  for (; k < width; k++) {
    square += at(x, k) * at(x, k);
    product += at(x, k) * at(dy, k) * at(weight, k);
  }
  const float inverse = 1.0f / __builtin_sqrtf(square / float(width) + eps);
  const float along = inverse * inverse * inverse * (product / float(width));
  for (k = 0; k < whole; k += kL) {
    const Vec<float> some = load<float>(x + k), gradient = load<float>(dy + k);
    store_narrow(dx + k, gradient * load<float>(weight + k) * inverse - some * along);
    store(dweight + k, load(dweight + k) + gradient * some * inverse);
  }
  for (; k < width; k++) {
    dx[k] = narrow<Element>(at(dy, k) * at(weight, k) * inverse - at(x, k) * along);
    dweight[k] += at(dy, k) * at(x, k) * inverse;
  }
}

template <class Element>
bool norm_gradients_as(const FastattnRmsNorm& n, int64_t tasks, const Team& team) {
  Shared shared(size_t(tasks * n.width) * sizeof(float));
  float* sums = shared.as<float>();
  if (sums == nullptr && tasks > 0) return false;
  const bool done = team.run(tasks, [&](int64_t task) {
    float* sum = sums + task * n.width;
    std::memset(sum, 0, size_t(n.width) * sizeof *sum);
    const int64_t end = (task + 1) * kTaskRows < n.rows ? (task + 1) * kTaskRows : n.rows;
    for (int64_t r = task * kTaskRows; r < end; r++) {
      const int64_t first = r * n.width;
      norm_row(static_cast<Element*>(n.y) + first, sum, static_cast<const Element*>(n.x) + first,
               static_cast<const Element*>(n.weight), static_cast<const Element*>(n.dy) + first, n.width, float(n.eps));
    }
    return true;
  });
  if (!done) return false;
  Element* dweight = static_cast<Element*>(n.dweight);
  for (int64_t k = 0; k < n.width; k++) {
    float sum = 0.0f;
    for (int64_t task = 0; task < tasks; task++) sum += sums[task * n.width + k];
    dweight[k] = narrow<Element>(sum);
  }
  return true;
}

// 1 / (1 + e^-x)
inline Vec<float> sigmoid(Vec<float> x) {
  constexpr float kLog2e = 1.4426950408889634f;
  return 1.0f / (exp2(x * -kLog2e) + 1.0f);
}

// Computes the vector at i of y = gate sigmoid(gate) up. With dup it computes the gradients, and y is that of gate.
template <class Element>
inline void gate_some(Element* y, Element* dup, const Element* gate, const Element* up, const Element* dy, int64_t i) {
  const Vec<float> g = load<float>(gate + i), u = load<float>(up + i), s = sigmoid(g);
  if (dup == nullptr) {
    store_narrow(y + i, g * s * u);
    return;
  }
  const Vec<float> d = load<float>(dy + i);
  store_narrow(y + i, d * u * s * (g * (1.0f - s) + 1.0f));
  store_narrow(dup + i, d * g * s);
}

template <class Element>
bool gate_as(const FastattnGate& a, const Team& team) {
  constexpr int kL = kLanes<float>;
  const auto *gate = static_cast<const Element*>(a.gate), *up = static_cast<const Element*>(a.up);
  const auto* dy = static_cast<const Element*>(a.dy);
  auto *y = static_cast<Element*>(a.y), *dup = static_cast<Element*>(a.dup);
  const int64_t count = a.rows * a.width;
  return team.run((count + kTaskElements - 1) / kTaskElements, [&](int64_t task) {
    int64_t i = task * kTaskElements;
    const int64_t end = i + kTaskElements < count ? i + kTaskElements : count;
    for (; i + kL <= end; i += kL) gate_some(y, dup, gate, up, dy, i);
    if (i == end) return true;
    Element in[3][kL] = {}, out[2][kL];  // less than a vector
    const size_t bytes = size_t(end - i) * sizeof(Element);
    std::memcpy(in[0], gate + i, bytes);
    std::memcpy(in[1], up + i, bytes);
    if (dup != nullptr) std::memcpy(in[2], dy + i, bytes);
    gate_some(out[0], dup == nullptr ? nullptr : out[1], in[0], in[1], in[2], 0);
    std::memcpy(y + i, out[0], bytes);
    if (dup != nullptr) std::memcpy(dup + i, out[1], bytes);
    return true;
  });
}

}  // namespace

bool rms_norm(const FastattnRmsNorm& n, const Team& team) {
  const int64_t tasks = (n.rows + kTaskRows - 1) / kTaskRows;
  if (n.dweight == nullptr) {
    return team.run(tasks, [&](int64_t task) {
      const int64_t first = task * kTaskRows, offset = first * n.width * element_bytes(n.dtype);
      const int64_t rows = first + kTaskRows < n.rows ? kTaskRows : n.rows - first;
      normalise({static_cast<const char*>(n.x) + offset, n.width, n.weight, static_cast<char*>(n.y) + offset, n.width,
                 n.dtype, rows, 1, n.width, n.eps});
      return true;
    });
  }
  switch (n.dtype) {
    case FASTATTN_FLOAT32: return norm_gradients_as<float>(n, tasks, team);
    case FASTATTN_FLOAT16: return norm_gradients_as<float16>(n, tasks, team);
    default: return norm_gradients_as<bfloat16>(n, tasks, team);
  }
}

bool gate(const FastattnGate& a, const Team& team) {
  switch (a.dtype) {
    case FASTATTN_FLOAT32: return gate_as<float>(a, team);
    case FASTATTN_FLOAT16: return gate_as<float16>(a, team);
    default: return gate_as<bfloat16>(a, team);
  }
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
