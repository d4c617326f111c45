// Runs the C interface without Python: for sanitizers, and for processors that are emulated. Every buffer is exactly as
// large as its tensor. Every function is held against plain loops in double; exits with 1 where they differ.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
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

// What a result may be off by: 1e-5, or an eps of half precision.
double unit(int64_t dtype) {
  return dtype == FASTATTN_FLOAT32 ? 1e-5 : dtype == FASTATTN_FLOAT16 ? 1.0 / 1024 : 1.0 / 128;
}

bool same(const char* name, const Elements& ours, const std::vector<double>& theirs, const Case& c) {
  double largest = 1.0, error = 0.0;
  for (int64_t i = 0; i < ours.count(); i++) {
    largest = std::fmax(largest, std::fabs(theirs[i]));
    const double difference = std::fabs(ours.at(i) - theirs[i]);
    error = difference <= error ? error : difference;  // NaN counts
  }
  if (error <= unit(c.dtype) * largest) return true;
  std::printf("%s in dtype %lld of Lq=%lld Lk=%lld D=%lld Dv=%lld: error %g\n", name, (long long)c.dtype, (long long)c.q_len, (long long)c.kv_len,
              (long long)c.head_dim, (long long)c.v_dim, error);
  return false;
}

bool check(const Case& c) {
  const int64_t q_count = kBatch * kQHeads * c.q_len, k_count = kBatch * kKvHeads * c.kv_len;
  Elements q(c.dtype, q_count * c.head_dim), k(c.dtype, k_count * c.head_dim), v(c.dtype, k_count * c.v_dim);
  Elements dout(c.dtype, q_count * c.v_dim), out(c.dtype, q_count * c.v_dim, false);
  Elements dq(c.dtype, q.count(), false), dk(c.dtype, k.count(), false), dv(c.dtype, v.count(), false);
  Elements bias(FASTATTN_FLOAT32, kQHeads * c.q_len * c.kv_len), dbias(FASTATTN_FLOAT32, bias.count(), false);
  Numbers lse = numbers(q_count, false), statistics = numbers(2 * q_count, false);
  const double scale = 0.3;

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
  a.scale = scale, a.softcap = c.softcap;
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

  using Doubles = std::vector<double>;
  Doubles out2(q_count * c.v_dim), dq2(q.count()), dk2(k.count()), dv2(v.count()), dbias2(bias.count());
  Doubles s(static_cast<size_t>(c.kv_len)), slope(static_cast<size_t>(c.kv_len)), dp(static_cast<size_t>(c.kv_len));
  for (int64_t b = 0; b < kBatch; b++) {
    for (int64_t h = 0; h < kQHeads; h++) {
      for (int64_t i = 0; i < c.q_len; i++) {
        const int64_t row = (b * kQHeads + h) * c.q_len + i;
        const int64_t first = (b * kKvHeads + h / (kQHeads / kKvHeads)) * c.kv_len;
        double top = -INFINITY, sum = 0.0, delta = 0.0;
        for (int64_t j = 0; j < c.kv_len; j++) {
          const bool seen = (c.left == FASTATTN_OPEN || j >= i - c.left) && (c.right == FASTATTN_OPEN || j <= i + c.right);
          double x = 0.0;
          for (int64_t d = 0; d < c.head_dim; d++) x += q.at(row * c.head_dim + d) * k.at((first + j) * c.head_dim + d);
          x *= scale, slope[j] = 1.0;
          if (c.softcap > 0.0) {
            const double t = std::tanh(x / c.softcap);
            x = t * c.softcap, slope[j] = 1.0 - t * t;
          }
          if (c.bias) x += bias.at((h * c.q_len + i) * c.kv_len + j);
          s[j] = seen ? x : -INFINITY;
          top = std::fmax(top, s[j]);
        }
        if (top == -INFINITY) continue;
        for (double& x : s) sum += x = std::exp(x - top);
        for (int64_t j = 0; j < c.kv_len; j++) {
          s[j] /= sum, dp[j] = 0.0;
          for (int64_t d = 0; d < c.v_dim; d++) {
            out2[row * c.v_dim + d] += s[j] * v.at((first + j) * c.v_dim + d);
            dp[j] += dout.at(row * c.v_dim + d) * v.at((first + j) * c.v_dim + d);
            dv2[(first + j) * c.v_dim + d] += s[j] * dout.at(row * c.v_dim + d);
          }
          delta += s[j] * dp[j];
        }
        for (int64_t j = 0; j < c.kv_len; j++) {
          const double ds = s[j] * (dp[j] - delta);
          if (c.bias) dbias2[(h * c.q_len + i) * c.kv_len + j] += ds;
          for (int64_t d = 0; d < c.head_dim; d++) {
            dq2[row * c.head_dim + d] += scale * ds * slope[j] * k.at((first + j) * c.head_dim + d);
            dk2[(first + j) * c.head_dim + d] += scale * ds * slope[j] * q.at(row * c.head_dim + d);
          }
        }
      }
    }
  }
  return same("out", out, out2, c) & same("dq", dq, dq2, c) & same("dk", dk, dk2, c) & same("dv", dv, dv2, c) &
         (!c.bias || same("dbias", dbias, dbias2, c));
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
  d.left = FASTATTN_OPEN, d.right = 0, d.scale = 0.3;
  if (c.page_size) {
    a.block_table = d.block_table = table.data();
    a.table_stride = d.table_stride = pages_each;
  }
  if (fastattn_cpu_append(&a) != 0 || fastattn_cpu_decode(&d) != 0) {
    std::printf("refused: %s\n", fastattn_cpu_last_error());
    return false;
  }
  double error = 0.0;
  for (int64_t b = 0; b < kBatch; b++) {
    for (int64_t h = 0; h < kQHeads; h++) {
      const int64_t own = h / (kQHeads / kKvHeads);
      const auto key = [&](int64_t j) {
        const int64_t page = c.page_size ? table[b * pages_each + j / slots] : b;
        return (page * slots + j % slots) * kKvHeads + own;
      };
      for (int64_t i = 0; i < c.q_len; i++) {
        const int64_t row = (b * kQHeads + h) * c.q_len + i, end = length - c.q_len + i + 1;
        std::vector<double> sums(static_cast<size_t>(c.v_dim));
        double total = 0.0;
        for (int64_t j = 0; j < end; j++) {
          double s = 0.0;
          for (int64_t e = 0; e < c.head_dim; e++) {
            const double x = j < c.held ? k_cache.at(key(j) * c.head_dim + e)
                                        : k.at(((b * kKvHeads + own) * c.added + j - c.held) * c.head_dim + e);
            s += q.at(row * c.head_dim + e) * x;
          }
          const double weight = std::exp(s * d.scale);
          total += weight;
          for (int64_t e = 0; e < c.v_dim; e++) {
            sums[e] += weight * (j < c.held ? v_cache.at(key(j) * c.v_dim + e)
                                            : v.at(((b * kKvHeads + own) * c.added + j - c.held) * c.v_dim + e));
          }
        }
        for (int64_t e = 0; e < c.v_dim; e++) {
          const double difference = std::fabs(out.at(row * c.v_dim + e) - sums[e] / total);
          error = difference <= error ? error : difference;  // NaN counts
        }
      }
    }
  }
  if (error <= unit(c.dtype)) return true;
  std::printf("decode in dtype %lld, Lq=%lld Lk=%lld page %lld: error %g\n", (long long)c.dtype, (long long)c.q_len,
              (long long)length, (long long)c.page_size, error);
  return false;
}

// Products of few rows, RMS norm and rotary positions, one after another as a step of generation makes them.
struct StepCase {
  int64_t dtype, rows, width, columns, heads, head_dim, gated, threads;
};

bool close(const char* name, const Elements& y, const std::vector<double>& expected, const StepCase& c) {
  double largest = 1.0, error = 0.0;
  for (int64_t i = 0; i < y.count(); i++) {
    largest = std::fmax(largest, std::fabs(expected[i]));
    const double difference = std::fabs(y.at(i) - expected[i]);
    error = difference <= error ? error : difference;  // NaN counts
  }
  if (error <= unit(c.dtype) * largest) return true;
  std::printf("%s in dtype %lld, %lld rows of %lld: error %g\n", name, (long long)c.dtype, (long long)c.rows, (long long)c.width, error);
  return false;
}

bool check_step(const StepCase& c) {
  const int64_t second = c.gated ? c.columns : 3, all = c.gated ? c.columns : c.columns + second;
  Elements x(c.dtype, c.rows * c.width), w0(c.dtype, c.columns * c.width), w1(c.dtype, second * c.width);
  Elements bias(c.dtype, c.columns), y(c.dtype, c.rows * all), old = y;
  FastattnLinear l{};
  l.team = {c.threads, nullptr};
  l.x = x.data(), l.x_stride = c.width, l.y = y.data(), l.y_stride = all, l.dtype = c.dtype, l.rows = c.rows, l.width = c.width;
  l.weight[0] = w0.data(), l.weight[1] = w1.data(), l.weight_stride[0] = l.weight_stride[1] = c.width;
  l.bias[0] = bias.data(), l.columns[0] = c.columns, l.columns[1] = second, l.gated = c.gated, l.add = 1;
  std::vector<double> product;
  for (int64_t r = 0; r < c.rows; r++) {
    const auto dot = [&](const Elements& w, int64_t column) {
      double sum = 0.0;
      for (int64_t k = 0; k < c.width; k++) sum += x.at(r * c.width + k) * w.at(column * c.width + k);
      return sum;
    };
    for (int64_t i = 0; i < all; i++) {
      const double first = i < c.columns ? dot(w0, i) + bias.at(i) : dot(w1, i - c.columns);
      product.push_back(old.at(r * all + i) + (c.gated ? first / (1.0 + std::exp(-first)) * dot(w1, i) : first));
    }
  }
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
  const FastattnCall calls[] = {{FASTATTN_CALL_LINEAR, &l}, {FASTATTN_CALL_NORM, &n}};
  if (fastattn_cpu_run(calls, 2) != 0) {
    std::printf("refused: %s\n", fastattn_cpu_last_error());
    return false;
  }
  std::vector<double> normalised, turned;
  for (int64_t head = 0; head < c.rows * c.heads; head++) {
    double squares = 0.0;
    for (int64_t i = 0; i < c.head_dim; i++) squares += std::pow(start.at(head * c.head_dim + i), 2.0);
    for (int64_t i = 0; i < c.head_dim; i++) {
      normalised.push_back(start.at(head * c.head_dim + i) / std::sqrt(squares / double(c.head_dim) + n.eps) * scale.at(i));
    }
  }
  const bool good = close("linear", y, product, c) & close("norm", heads, normalised, c);
  start = heads;
  if (fastattn_cpu_rotate(&o) != 0) return false;
  for (int64_t head = 0; head < c.rows * c.heads; head++) {
    const int64_t table = position[head / c.heads] * half_dim;
    for (int64_t i = 0; i < c.head_dim; i++) {
      const int64_t at = table + i % half_dim, other = head * c.head_dim + (i + half_dim) % c.head_dim;
      const double with = start.at(other) * sin[at];
      turned.push_back(start.at(head * c.head_dim + i) * cos[at] + (i < half_dim ? -with : with));
    }
  }
  return good & close("rotate", heads, turned, c);
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
  for (const int64_t dtype : {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16}) {
    good &= check_cache({dtype, 1, 700, 1, 64, 64, 0, 3}) & check_cache({dtype, 3, 90, 5, 40, 24, 16, 2});
  }
  for (const int64_t dtype : {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16}) {
    good &= check_step({dtype, 1, 64, 130, 3, 64, 0, 3}) & check_step({dtype, 7, 37, 5, 2, 6, 0, 1}) &
            check_step({dtype, 8, 96, 70, 1, 36, 1, 2});
  }
  std::printf("%s, %s\n", fastattn_cpu_variant(), good ? "good" : "bad");
  return good ? 0 : 1;
}
