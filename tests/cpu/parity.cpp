// Runs the C interface without Python: for sanitizers, and for processors that are emulated. Every buffer is exactly as
// large as its tensor. Forward and backward are held against plain loops in double; exits with 1 where they differ.
#include <cmath>
#include <cstdio>
#include <vector>

#include "interface.h"

namespace {

using Numbers = std::vector<float>;

struct Case {
  int64_t q_len, kv_len, head_dim, v_dim, left, right;
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

FastattnView view(Numbers& x, int64_t heads, int64_t length, int64_t width) {
  return {x.data(), {heads * length * width, length * width, width, 1}};
}

bool same(const char* name, const Numbers& ours, const std::vector<double>& theirs, const Case& c) {
  double largest = 1.0, error = 0.0;
  for (size_t i = 0; i < ours.size(); i++) {
    largest = std::fmax(largest, std::fabs(theirs[i]));
    const double difference = std::fabs(double(ours[i]) - theirs[i]);
    error = difference <= error ? error : difference;  // NaN counts
  }
  if (error <= 1e-5 * largest) return true;
  std::printf("%s of Lq=%lld Lk=%lld D=%lld Dv=%lld: error %g\n", name, (long long)c.q_len, (long long)c.kv_len,
              (long long)c.head_dim, (long long)c.v_dim, error);
  return false;
}

bool check(const Case& c) {
  const int64_t q_count = kBatch * kQHeads * c.q_len, k_count = kBatch * kKvHeads * c.kv_len;
  Numbers q = numbers(q_count * c.head_dim, true), k = numbers(k_count * c.head_dim, true);
  Numbers v = numbers(k_count * c.v_dim, true), dout = numbers(q_count * c.v_dim, true);
  Numbers bias = numbers(kQHeads * c.q_len * c.kv_len, true);
  Numbers out = numbers(q_count * c.v_dim, false), lse = numbers(q_count, false), statistics = numbers(2 * q_count, false);
  Numbers dq = numbers(int64_t(q.size()), false), dk = numbers(int64_t(k.size()), false);
  Numbers dv = numbers(int64_t(v.size()), false), dbias = numbers(int64_t(bias.size()), false);
  const double scale = 0.3;

  FastattnAttention a{};
  a.team = {c.threads, nullptr};
  a.q = view(q, kQHeads, c.q_len, c.head_dim);
  a.k = view(k, kKvHeads, c.kv_len, c.head_dim);
  a.v = view(v, kKvHeads, c.kv_len, c.v_dim);
  a.out = view(out, kQHeads, c.q_len, c.v_dim);
  a.lse = lse.data();
  a.statistics = statistics.data();
  a.batch = kBatch, a.q_heads = kQHeads, a.kv_heads = kKvHeads, a.q_len = c.q_len, a.kv_len = c.kv_len;
  a.head_dim = c.head_dim, a.v_dim = c.v_dim, a.left = c.left, a.right = c.right;
  a.scale = scale, a.softcap = c.softcap;
  FastattnOperands o{};
  FastattnGradients g{};
  if (c.bias) {
    o.bias = {bias.data(), {0, c.q_len * c.kv_len, c.kv_len, 1}};
    o.bias_size[0] = 1, o.bias_size[1] = kQHeads, o.bias_size[2] = c.q_len, o.bias_size[3] = c.kv_len;
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
  Doubles out2(out.size()), dq2(q.size()), dk2(k.size()), dv2(v.size()), dbias2(bias.size());
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
          for (int64_t d = 0; d < c.head_dim; d++) x += double(q[row * c.head_dim + d]) * k[(first + j) * c.head_dim + d];
          x *= scale, slope[j] = 1.0;
          if (c.softcap > 0.0) {
            const double t = std::tanh(x / c.softcap);
            x = t * c.softcap, slope[j] = 1.0 - t * t;
          }
          if (c.bias) x += bias[(h * c.q_len + i) * c.kv_len + j];
          s[j] = seen ? x : -INFINITY;
          top = std::fmax(top, s[j]);
        }
        if (top == -INFINITY) continue;
        for (double& x : s) sum += x = std::exp(x - top);
        for (int64_t j = 0; j < c.kv_len; j++) {
          s[j] /= sum, dp[j] = 0.0;
          for (int64_t d = 0; d < c.v_dim; d++) {
            out2[row * c.v_dim + d] += s[j] * v[(first + j) * c.v_dim + d];
            dp[j] += double(dout[row * c.v_dim + d]) * v[(first + j) * c.v_dim + d];
            dv2[(first + j) * c.v_dim + d] += s[j] * dout[row * c.v_dim + d];
          }
          delta += s[j] * dp[j];
        }
        for (int64_t j = 0; j < c.kv_len; j++) {
          const double ds = s[j] * (dp[j] - delta);
          if (c.bias) dbias2[(h * c.q_len + i) * c.kv_len + j] += ds;
          for (int64_t d = 0; d < c.head_dim; d++) {
            dq2[row * c.head_dim + d] += scale * ds * slope[j] * k[(first + j) * c.head_dim + d];
            dk2[(first + j) * c.head_dim + d] += scale * ds * slope[j] * q[row * c.head_dim + d];
          }
        }
      }
    }
  }
  return same("out", out, out2, c) & same("dq", dq, dq2, c) & same("dk", dk, dk2, c) & same("dv", dv, dv2, c) &
         (!c.bias || same("dbias", dbias, dbias2, c));
}

}  // namespace

int main() {
  constexpr int64_t open = FASTATTN_OPEN;
  const Case cases[] = {
      {1, 1, 1, 1, open, open, 0.0, false, 1},    {65, 100, 40, 24, open, 0, 0.0, true, 3},
      {130, 257, 33, 7, 70, 5, 2.0, false, 3},    {17, 300, 64, 64, open, open, 0.0, true, 2},
      {200, 60, 16, 48, open, 0, 5.0, true, 3},   {70, 33, 8, 129, 3, -2, 0.0, false, 2},
  };
  bool good = true;
  for (const Case& c : cases) good &= check(c);
  std::printf("%s, %s\n", fastattn_cpu_variant(), good ? "good" : "bad");
  return good ? 0 : 1;
}
