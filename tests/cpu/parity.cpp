// Runs the C interface without Python: for sanitizers, and for processors that are emulated. Every buffer is exactly as
// large as its tensor. Every function is held to the rule of fastattn/testing.py; exits with 1 where one is not.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "interface.h"

namespace {

using Numbers = std::vector<float>;

struct Case {
  int64_t dtype, q_len, kv_len, head_dim, v_dim, left, right;
  double softcap;
  bool bias;
  int64_t threads;
};

constexpr int64_t kBatch = 2, kQHeads = 4, kKvHeads = 2;
unsigned state = 1;

float random_number() {
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 23) - 1.0f;
}

Numbers numbers(int64_t count, bool random) {
  Numbers x(static_cast<size_t>(count));
  for (float& value : x) value = random ? random_number() : NAN;
  return x;
}

// Of a number that float16 has too.
uint16_t half(float x, int64_t dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == FASTATTN_BFLOAT16) return uint16_t(bits >> 16);
  return bits << 1 == 0 ? 0 : uint16_t((bits >> 16 & 0x8000) | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023));
}

float whole(uint16_t x, int64_t dtype) {
  if (dtype == FASTATTN_FLOAT16) {
    const float magnitude = std::ldexp(float((x & 1023) | (x & 0x7c00 ? 1024 : 0)), std::max(x >> 10 & 31, 1) - 25);
    return x & 0x8000 ? -magnitude : magnitude;
  }
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The elements of a tensor of `dtype`, in memory exactly as large: eighths, which every dtype has, or NaN.
struct Elements {
  int64_t dtype;
  Numbers wide;
  std::vector<uint16_t> narrow;

  Elements(int64_t dtype, int64_t count, bool random = true) : dtype(dtype) {
    for (int64_t i = 0; i < count; i++) {
      const float x = random ? std::floor(random_number() * 8.0f) / 8.0f : NAN;
      dtype == FASTATTN_FLOAT32 ? wide.push_back(x) : narrow.push_back(half(x, dtype));
    }
    wide.shrink_to_fit(), narrow.shrink_to_fit();
  }
  void* data() { return dtype == FASTATTN_FLOAT32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  int64_t count() const { return int64_t(wide.size() + narrow.size()); }
  double at(int64_t i) const { return dtype == FASTATTN_FLOAT32 ? wide[i] : whole(narrow[i], dtype); }
};

FastattnView view(Elements& x, int64_t heads, int64_t length, int64_t width) {
  return {x.data(), {heads * length * width, length * width, width, 1}};
}

using Doubles = std::vector<double>;

double eps(int64_t dtype) { return std::ldexp(1.0, dtype == FASTATTN_FLOAT32 ? -23 : dtype == FASTATTN_FLOAT16 ? -10 : -7); }

float nearest(float x, int64_t dtype) {
  if (dtype == FASTATTN_FLOAT32 || x == 0.0f || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - (dtype == FASTATTN_FLOAT16 ? 11 : 8), dtype == FASTATTN_FLOAT16 ? -24 : -133);
  return std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
}

// What plain loops compute in: double is the truth. Plain code in a dtype sums in float, and rounds what it keeps.
struct Exact {
  using Number = double;
  double kept(double x) const { return x; }
};

struct Plain {
  using Number = float;
  int64_t dtype;
  float kept(float x) const { return nearest(x, dtype); }
};

// The error may be twice that of the plain loops, plus rounding: of the result to its dtype, of sums to float. Of the
// largest error and of the RMS.
bool holds(const std::string& name, const Elements& ours, const Doubles& exact, const Doubles& plain) {
  double largest[3] = {0.0, 0.0, 0.0}, squares[3] = {0.0, 0.0, 0.0};
  for (int64_t i = 0; i < ours.count(); i++) {
    const double sizes[3] = {exact[i], ours.at(i) - exact[i], plain[i] - exact[i]};
    for (int n = 0; n < 3; n++) {
      const double size = std::fabs(sizes[n]);
      largest[n] = size <= largest[n] ? largest[n] : size;  // NaN counts
      squares[n] += size * size;
    }
  }
  bool good = true;
  for (const bool rms : {false, true}) {
    const auto measure = [&](int n) { return rms ? std::sqrt(squares[n] / double(ours.count())) : largest[n]; };
    const double bound = 2.0 * measure(2) + eps(ours.dtype) * measure(0) + eps(FASTATTN_FLOAT32) * std::fmax(1.0, measure(0));
    if (measure(1) <= bound) continue;
    std::printf("%s: %s error %g, bound %g\n", name.c_str(), rms ? "RMS" : "largest", measure(1), bound);
    good = false;
  }
  return good;
}

struct Inputs {
  const Elements &q, &k, &v, &dout, &bias;
};

struct Results {
  Doubles out, dq, dk, dv, dbias;
};

constexpr double kScale = 0.3;

template <class Arithmetic>
Results attention(const Arithmetic& a, const Case& c, const Inputs& x) {
  using Number = typename Arithmetic::Number;
  using Numbers = std::vector<Number>;
  Numbers out(x.dout.count()), dq(x.q.count()), dk(x.k.count()), dv(x.v.count()), dbias(x.bias.count());
  Numbers s(c.kv_len), slope(c.kv_len), dp(c.kv_len);
  const auto at = [](const Elements& elements, int64_t i) { return Number(elements.at(i)); };
  for (int64_t b = 0; b < kBatch; b++) {
    for (int64_t h = 0; h < kQHeads; h++) {
      for (int64_t i = 0; i < c.q_len; i++) {
        const int64_t row = (b * kQHeads + h) * c.q_len + i;
        const int64_t first = (b * kKvHeads + h / (kQHeads / kKvHeads)) * c.kv_len;
        Number top = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < c.kv_len; j++) {
          const bool seen = (c.left == FASTATTN_OPEN || j >= i - c.left) && (c.right == FASTATTN_OPEN || j <= i + c.right);
          Number score = 0;
          for (int64_t d = 0; d < c.head_dim; d++) score += at(x.q, row * c.head_dim + d) * at(x.k, (first + j) * c.head_dim + d);
          score = a.kept(score * Number(kScale)), slope[j] = 1;
          if (c.softcap > 0.0) {
            const Number t = a.kept(std::tanh(score / Number(c.softcap)));
            score = a.kept(t * Number(c.softcap)), slope[j] = 1 - t * t;
          }
          if (c.bias) score += at(x.bias, (h * c.q_len + i) * c.kv_len + j);
          s[j] = seen ? score : Number(-INFINITY);
          top = std::fmax(top, s[j]);
        }
        if (top == Number(-INFINITY)) continue;
        for (Number& p : s) sum += p = std::exp(p - top);
        for (int64_t j = 0; j < c.kv_len; j++) {
          s[j] = a.kept(s[j] / sum), dp[j] = 0;
          for (int64_t d = 0; d < c.v_dim; d++) {
            const Number value = at(x.v, (first + j) * c.v_dim + d), dout = at(x.dout, row * c.v_dim + d);
            out[row * c.v_dim + d] += s[j] * value;
            dp[j] += dout * value;
            dv[(first + j) * c.v_dim + d] += s[j] * dout;
          }
          dp[j] = a.kept(dp[j]);
          delta += s[j] * dp[j];
        }
        for (int64_t j = 0; j < c.kv_len; j++) {
          const Number ds = a.kept(s[j] * (dp[j] - delta)), through = a.kept(Number(kScale) * ds * slope[j]);
          if (c.bias) dbias[(h * c.q_len + i) * c.kv_len + j] += ds;
          for (int64_t d = 0; d < c.head_dim; d++) {
            dq[row * c.head_dim + d] += through * at(x.k, (first + j) * c.head_dim + d);
            dk[(first + j) * c.head_dim + d] += through * at(x.q, row * c.head_dim + d);
          }
        }
      }
    }
  }
  for (Numbers* result : {&out, &dq, &dk, &dv}) {
    for (Number& number : *result) number = a.kept(number);
  }
  const auto wide = [](const Numbers& numbers) { return Doubles(numbers.begin(), numbers.end()); };
  return {wide(out), wide(dq), wide(dk), wide(dv), wide(dbias)};
}

bool check(const Case& c) {
  const int64_t q_count = kBatch * kQHeads * c.q_len, k_count = kBatch * kKvHeads * c.kv_len;
  Elements q(c.dtype, q_count * c.head_dim), k(c.dtype, k_count * c.head_dim), v(c.dtype, k_count * c.v_dim);
  Elements dout(c.dtype, q_count * c.v_dim), out(c.dtype, q_count * c.v_dim, false);
  Elements dq(c.dtype, q.count(), false), dk(c.dtype, k.count(), false), dv(c.dtype, v.count(), false);
  Elements bias(FASTATTN_FLOAT32, kQHeads * c.q_len * c.kv_len), dbias(FASTATTN_FLOAT32, bias.count(), false);
  Numbers lse = numbers(q_count, false), statistics = numbers(2 * q_count, false);

  FastattnAttention a{};
  a.team = {c.threads, nullptr};
  a.q = view(q, kQHeads, c.q_len, c.head_dim);
  a.k = view(k, kKvHeads, c.kv_len, c.head_dim);
  a.v = view(v, kKvHeads, c.kv_len, c.v_dim);
  a.out = view(out, kQHeads, c.q_len, c.v_dim);
  a.lse = lse.data();
  a.statistics = statistics.data();
  a.dtype = c.dtype;
  a.batch = kBatch, a.q_heads = kQHeads, a.kv_heads = kKvHeads, a.q_len = c.q_len, a.kv_len = c.kv_len;
  a.head_dim = c.head_dim, a.v_dim = c.v_dim, a.left = c.left, a.right = c.right;
  a.scale = kScale, a.softcap = c.softcap;
  FastattnOperands o{};
  FastattnGradients g{};
  if (c.bias) {
    o.bias = {bias.data(), {0, c.q_len * c.kv_len, c.kv_len, 1}};
    o.bias_size[0] = 1, o.bias_size[1] = kQHeads, o.bias_size[2] = c.q_len, o.bias_size[3] = c.kv_len;
    o.bias_dtype = FASTATTN_FLOAT32;
    g.dbias = dbias.data();
  }
  g.dout = view(dout, kQHeads, c.q_len, c.v_dim);
  g.dq = view(dq, kQHeads, c.q_len, c.head_dim);
  g.dk = view(dk, kKvHeads, c.kv_len, c.head_dim);
  g.dv = view(dv, kKvHeads, c.kv_len, c.v_dim);
  if (fastattn_cpu_forward(&a, &o) != 0 || fastattn_cpu_backward(&a, &o, &g) != 0) {
    std::printf("refused: %s\n", fastattn_cpu_last_error());
    return false;
  }

  const Inputs inputs{q, k, v, dout, bias};
  const Results exact = attention(Exact{}, c, inputs), plain = attention(Plain{c.dtype}, c, inputs);
  char where[100];
  std::snprintf(where, sizeof where, " in dtype %lld of Lq=%lld Lk=%lld D=%lld Dv=%lld", (long long)c.dtype, (long long)c.q_len,
                (long long)c.kv_len, (long long)c.head_dim, (long long)c.v_dim);
  const auto same = [&](const char* name, const Elements& ours, Doubles Results::*part) {
    return holds(std::string(name) + where, ours, exact.*part, plain.*part);
  };
  return same("out", out, &Results::out) & same("dq", dq, &Results::dq) & same("dk", dk, &Results::dk) &
         same("dv", dv, &Results::dv) & (!c.bias || same("dbias", dbias, &Results::dbias));
}

// Appends all but the first `held` keys to a cache, paged or not, then decodes, both in `dtype`.
struct CacheCase {
  int64_t dtype, q_len, held, added, head_dim, v_dim, page_size, threads;
};

bool check_cache(const CacheCase& c) {
  const int64_t length = c.held + c.added, pages_each = c.page_size ? (length + c.page_size - 1) / c.page_size : 1;
  const int64_t slots = c.page_size ? c.page_size : length, pages = kBatch * pages_each;
  Elements q(c.dtype, kBatch * kQHeads * c.q_len * c.head_dim), out(c.dtype, kBatch * kQHeads * c.q_len * c.v_dim);
  Elements k(c.dtype, kBatch * kKvHeads * c.added * c.head_dim), v(c.dtype, kBatch * kKvHeads * c.added * c.v_dim);
  Elements k_cache(c.dtype, pages * slots * kKvHeads * c.head_dim), v_cache(c.dtype, pages * slots * kKvHeads * c.v_dim);
  Numbers lse = numbers(kBatch * kQHeads * c.q_len, false);
  const std::vector<int64_t> lens(kBatch, c.held);
  std::vector<int32_t> table;  // the pages backwards
  for (int64_t page = pages; page-- > 0;) table.push_back(int32_t(page));
  table.shrink_to_fit();
  const auto heads = [](Elements& x, int64_t count, int64_t rows, int64_t width) {
    return FastattnView{x.data(), {count * rows * width, rows * width, width, 1}};
  };
  const auto cache = [slots](Elements& x, int64_t width) {
    return FastattnView{x.data(), {slots * kKvHeads * width, kKvHeads * width, width, 1}};
  };
  FastattnAppend a{};
  a.team = {c.threads, nullptr};
  a.k = heads(k, kKvHeads, c.added, c.head_dim), a.v = heads(v, kKvHeads, c.added, c.v_dim);
  a.k_cache = cache(k_cache, c.head_dim), a.v_cache = cache(v_cache, c.v_dim);
  a.lens = lens.data(), a.element_size = c.dtype == FASTATTN_FLOAT32 ? 4 : 2;
  a.batch = kBatch, a.kv_heads = kKvHeads, a.new_len = c.added, a.head_dim = c.head_dim, a.v_dim = c.v_dim;
  a.pages = pages, a.page_size = c.page_size, a.capacity = c.page_size ? pages_each * slots : slots;
  FastattnDecode d{};
  d.team = a.team, d.q = heads(q, kQHeads, c.q_len, c.head_dim), d.out = heads(out, kQHeads, c.q_len, c.v_dim);
  d.k_cache = a.k_cache, d.v_cache = a.v_cache, d.lse = lse.data(), d.lens = a.lens, d.dtype = c.dtype;
  d.batch = kBatch, d.q_heads = kQHeads, d.kv_heads = kKvHeads, d.q_len = c.q_len, d.head_dim = c.head_dim;
  d.v_dim = c.v_dim, d.pages = pages, d.page_size = c.page_size, d.capacity = a.capacity, d.added = c.added;
  d.left = FASTATTN_OPEN, d.right = 0, d.scale = kScale;
  if (c.page_size) {
    a.block_table = d.block_table = table.data();
    a.table_stride = d.table_stride = pages_each;
  }
  if (fastattn_cpu_append(&a) != 0 || fastattn_cpu_decode(&d) != 0) {
    std::printf("refused: %s\n", fastattn_cpu_last_error());
    return false;
  }
  const auto decode = [&](const auto& arithmetic) {
    using Number = typename std::decay_t<decltype(arithmetic)>::Number;
    Doubles results;
    for (int64_t b = 0; b < kBatch; b++) {
      for (int64_t h = 0; h < kQHeads; h++) {
        const int64_t own = h / (kQHeads / kKvHeads);
        const auto at = [&](const Elements& cache, const Elements& added, int64_t j, int64_t width, int64_t e) {
          const int64_t page = c.page_size ? table[b * pages_each + j / slots] : b;
          return Number(j < c.held ? cache.at(((page * slots + j % slots) * kKvHeads + own) * width + e)
                                   : added.at(((b * kKvHeads + own) * c.added + j - c.held) * width + e));
        };
        for (int64_t i = 0; i < c.q_len; i++) {
          const int64_t row = (b * kQHeads + h) * c.q_len + i, end = length - c.q_len + i + 1;
          std::vector<Number> p, sums(c.v_dim);
          Number total = 0;
          for (int64_t j = 0; j < end; j++) {
            Number s = 0;
            for (int64_t e = 0; e < c.head_dim; e++) s += Number(q.at(row * c.head_dim + e)) * at(k_cache, k, j, c.head_dim, e);
            p.push_back(std::exp(arithmetic.kept(s * Number(kScale))));
            total += p.back();
          }
          for (int64_t j = 0; j < end; j++) {
            p[j] = arithmetic.kept(p[j] / total);
            for (int64_t e = 0; e < c.v_dim; e++) sums[e] += p[j] * at(v_cache, v, j, c.v_dim, e);
          }
          for (const Number sum : sums) results.push_back(arithmetic.kept(sum));
        }
      }
    }
    return results;
  };
  char name[100];
  std::snprintf(name, sizeof name, "decode in dtype %lld, Lq=%lld Lk=%lld page %lld", (long long)c.dtype, (long long)c.q_len,
                (long long)length, (long long)c.page_size);
  return holds(name, out, decode(Exact{}), decode(Plain{c.dtype}));
}

// Products of few rows, RMS norm and rotary positions, one after another as a step of generation makes them.
struct StepCase {
  int64_t dtype, rows, width, columns, heads, head_dim, gated, threads;
};

bool check_step(const StepCase& c) {
  const int64_t second = c.gated ? c.columns : 3, all = c.gated ? c.columns : c.columns + second;
  Elements x(c.dtype, c.rows * c.width), w0(c.dtype, c.columns * c.width), w1(c.dtype, second * c.width);
  Elements bias(c.dtype, c.columns), y(c.dtype, c.rows * all), old = y;
  FastattnLinear l{};
  l.team = {c.threads, nullptr};
  l.x = x.data(), l.x_stride = c.width, l.y = y.data(), l.y_stride = all, l.dtype = c.dtype, l.rows = c.rows, l.width = c.width;
  l.weight[0] = w0.data(), l.weight[1] = w1.data(), l.weight_stride[0] = l.weight_stride[1] = c.width;
  l.bias[0] = bias.data(), l.columns[0] = c.columns, l.columns[1] = second, l.gated = c.gated, l.add = 1;
  const auto product = [&](const auto& a) {
    using Number = typename std::decay_t<decltype(a)>::Number;
    Doubles results;
    for (int64_t r = 0; r < c.rows; r++) {
      const auto dot = [&](const Elements& w, int64_t column, Number sum) {
        for (int64_t k = 0; k < c.width; k++) sum += Number(x.at(r * c.width + k)) * Number(w.at(column * c.width + k));
        return a.kept(sum);
      };
      for (int64_t i = 0; i < all; i++) {
        Number sum = i < c.columns ? dot(w0, i, Number(bias.at(i))) : dot(w1, i - c.columns, 0);
        if (c.gated) sum = a.kept(a.kept(sum / (1 + std::exp(-sum))) * dot(w1, i, 0));
        results.push_back(a.kept(Number(old.at(r * all + i)) + sum));
      }
    }
    return results;
  };
  const int64_t wide = c.heads * c.head_dim, half_dim = c.head_dim / 2;
  Elements heads(c.dtype, c.rows * wide), scale(c.dtype, c.head_dim), start = heads;
  const std::vector<int64_t> position = [&] {
    std::vector<int64_t> values(static_cast<size_t>(c.rows));
    for (int64_t r = 0; r < c.rows; r++) values[r] = (r * 2) % 3;
    return values;
  }();
  Numbers cos = numbers(3 * half_dim, true), sin = numbers(3 * half_dim, true);
  FastattnNorm n{};
  n.x = n.y = heads.data(), n.x_stride = n.y_stride = wide, n.weight = scale.data(), n.dtype = c.dtype;
  n.rows = c.rows, n.heads = c.heads, n.width = c.head_dim, n.eps = 0.1;
  FastattnRotate o{};
  o.team.threads = 1, o.x = o.y = heads.data(), o.x_stride = o.y_stride = wide, o.cos = cos.data(), o.sin = sin.data(), o.position = position.data();
  o.positions = 3, o.dtype = c.dtype, o.rows = c.rows, o.heads = c.heads, o.head_dim = c.head_dim;
  const bool interleaved = c.rows % 2 == 1;
  o.rotated = c.head_dim, o.interleaved = interleaved;
  const FastattnCall calls[] = {{FASTATTN_CALL_LINEAR, &l}, {FASTATTN_CALL_NORM, &n}};
  if (fastattn_cpu_run(calls, 2) != 0) {
    std::printf("refused: %s\n", fastattn_cpu_last_error());
    return false;
  }
  const auto normalised = [&](const auto& a) {
    using Number = typename std::decay_t<decltype(a)>::Number;
    Doubles results;
    for (int64_t first = 0; first < start.count(); first += c.head_dim) {
      Number squares = 0;
      for (int64_t i = 0; i < c.head_dim; i++) squares += Number(start.at(first + i)) * Number(start.at(first + i));
      const Number size = std::sqrt(squares / Number(c.head_dim) + Number(n.eps));
      for (int64_t i = 0; i < c.head_dim; i++) {
        results.push_back(a.kept(a.kept(Number(start.at(first + i)) / size) * Number(scale.at(i))));
      }
    }
    return results;
  };
  const auto turned = [&](const auto& a) {
    using Number = typename std::decay_t<decltype(a)>::Number;
    Doubles results;
    for (int64_t head = 0; head < c.rows * c.heads; head++) {
      const int64_t table = position[head / c.heads] * half_dim;
      for (int64_t i = 0; i < c.head_dim; i++) {
        const int64_t at = table + (interleaved ? i / 2 : i % half_dim);
        const int64_t other = head * c.head_dim + (interleaved ? i ^ 1 : (i + half_dim) % c.head_dim);
        const bool first = interleaved ? i % 2 == 0 : i < half_dim;
        const Number with = a.kept(Number(start.at(other)) * sin[at]);
        results.push_back(a.kept(a.kept(Number(start.at(head * c.head_dim + i)) * cos[at]) + (first ? -with : with)));
      }
    }
    return results;
  };
  char where[100];
  std::snprintf(where, sizeof where, " in dtype %lld, %lld rows of %lld", (long long)c.dtype, (long long)c.rows, (long long)c.width);
  const auto same = [&](const char* name, const Elements& ours, const auto& loops) {
    return holds(std::string(name) + where, ours, loops(Exact{}), loops(Plain{c.dtype}));
  };
  const bool good = same("linear", y, product) & same("norm", heads, normalised);
  start = heads;
  if (fastattn_cpu_rotate(&o) != 0) return false;
  return good & same("rotate", heads, turned);
}

// RMS norm and SwiGLU of whole layers, and their gradients.
struct LayerCase {
  int64_t dtype, rows, width, threads;
};

bool check_layers(const LayerCase& c) {
  const int64_t count = c.rows * c.width;
  Elements x(c.dtype, count), up(c.dtype, count), dy(c.dtype, count), weight(c.dtype, c.width);
  Elements y(c.dtype, count, false), dx = y, dweight(c.dtype, c.width, false), gated = y, dgate = y, dup = y;
  FastattnRmsNorm n{};
  n.team = {c.threads, nullptr}, n.dtype = c.dtype, n.rows = c.rows, n.width = c.width, n.eps = 0.1;
  n.x = x.data(), n.weight = weight.data(), n.y = y.data();
  FastattnGate g{};
  g.team = n.team, g.dtype = c.dtype, g.rows = c.rows, g.width = c.width;
  g.gate = x.data(), g.up = up.data(), g.y = gated.data();
  bool good = fastattn_cpu_rms_norm(&n) == 0 && fastattn_cpu_gate(&g) == 0;
  n.dy = g.dy = dy.data(), n.y = dx.data(), n.dweight = dweight.data(), g.y = dgate.data(), g.dup = dup.data();
  good = good && fastattn_cpu_rms_norm(&n) == 0 && fastattn_cpu_gate(&g) == 0;
  if (!good) {
    std::printf("refused: %s\n", fastattn_cpu_last_error());
    return false;
  }
  const auto loops = [&](const auto& a) {
    using Number = typename std::decay_t<decltype(a)>::Number;
    std::vector<Doubles> results(6);  // y, dx, dweight, gated, dgate, dup
    std::vector<Number> sums(static_cast<size_t>(c.width));
    for (int64_t first = 0; first < count; first += c.width) {
      Number squares = 0, products = 0;
      for (int64_t k = 0; k < c.width; k++) {
        squares += Number(x.at(first + k)) * Number(x.at(first + k));
        products += Number(x.at(first + k)) * a.kept(Number(dy.at(first + k)) * Number(weight.at(k)));
      }
      const Number size = std::sqrt(squares / Number(c.width) + Number(n.eps)), along = products / Number(c.width) / (size * size);
      for (int64_t k = 0; k < c.width; k++) {
        const Number value = Number(x.at(first + k)), d = Number(dy.at(first + k)), of_up = Number(up.at(first + k));
        const Number normal = a.kept(value / size), weighted = a.kept(d * Number(weight.at(k)));
        results[0].push_back(a.kept(normal * Number(weight.at(k))));
        results[1].push_back(a.kept((weighted - value * along) / size));
        sums[k] += a.kept(d * normal);
        const Number part = 1 / (1 + std::exp(-value)), silu = a.kept(value * part);
        results[3].push_back(a.kept(silu * of_up));
        results[4].push_back(a.kept(a.kept(d * of_up) * part * (1 + value * (1 - part))));
        results[5].push_back(a.kept(d * silu));
      }
    }
    for (const Number sum : sums) results[2].push_back(a.kept(sum));
    return results;
  };
  const std::vector<Doubles> exact = loops(Exact{}), plain = loops(Plain{c.dtype});
  const Elements* ours[] = {&y, &dx, &dweight, &gated, &dgate, &dup};
  const char* names[] = {"y", "dx", "dweight", "gated", "dgate", "dup"};
  char where[100];
  std::snprintf(where, sizeof where, " in dtype %lld, %lld rows of %lld", (long long)c.dtype, (long long)c.rows, (long long)c.width);
  for (int i = 0; i < 6; i++) good &= holds(std::string(names[i]) + where, *ours[i], exact[i], plain[i]);
  return good;
}

}  // namespace

int main() {
  constexpr int64_t open = FASTATTN_OPEN;
  bool good = true;
  for (const int64_t dtype : {FASTATTN_FLOAT32, FASTATTN_BFLOAT16}) {
    good &= check({dtype, 1, 1, 1, 1, open, open, 0.0, false, 1}) & check({dtype, 65, 100, 40, 24, open, 0, 0.0, true, 3}) &
            check({dtype, 130, 257, 33, 7, 70, 5, 2.0, false, 3}) & check({dtype, 17, 300, 64, 64, open, open, 0.0, true, 2}) &
            check({dtype, 200, 60, 16, 48, open, 0, 5.0, true, 3}) & check({dtype, 70, 33, 8, 129, 3, -2, 0.0, false, 2});
  }
  good &= check({FASTATTN_FLOAT32, 385, 150, 64, 64, open, 0, 0.0, false, 2});  // taller tiles, by FASTATTN_KEPT
  for (const int64_t dtype : {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16}) {
    good &= check_cache({dtype, 1, 700, 1, 64, 64, 0, 3}) & check_cache({dtype, 3, 90, 5, 40, 24, 16, 2});
  }
  for (const int64_t dtype : {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16}) {
    good &= check_step({dtype, 1, 64, 130, 3, 64, 0, 3}) & check_step({dtype, 7, 37, 5, 2, 6, 0, 1}) &
            check_step({dtype, 8, 96, 70, 1, 36, 1, 2});
    good &= check_layers({dtype, 1, 1, 1}) & check_layers({dtype, 150, 37, 3}) & check_layers({dtype, 3, 6000, 2});
  }
  std::printf("%s, %s\n", fastattn_cpu_variant(), good ? "good" : "bad");
  return good ? 0 : 1;
}
