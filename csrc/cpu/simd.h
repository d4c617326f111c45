// Vectors of the compiler: one source for every instruction set. Few functions use the instructions of one set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef FASTATTN_VECTOR_BYTES
#if defined(__AVX512F__)
#define FASTATTN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTATTN_VECTOR_BYTES 32
#else
#define FASTATTN_VECTOR_BYTES 16
#endif
#endif

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

template <class T>
constexpr int kLanes = FASTATTN_VECTOR_BYTES / sizeof(T);

template <class T, int lanes>
struct VecOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(lanes * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <class T>
using Vec = typename VecOf<T, kLanes<T>>::type;

// Integers as wide as T, and vectors of them.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T>
using VecInt = typename VecOf<IntOf<T>, kLanes<T>>::type;

struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

struct float8 {  // e4m3fn: no infinities, largest number 448
  uint8_t bits;
};

// -- Loads and stores ------------------------------------------------------------------------------------------------

template <class T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T, kLanes<T>>::unaligned*>(from);
}

template <class T>
inline void store(T* to, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T, kLanes<T>>::unaligned*>(to) = x;
}

// Stores past the caches, at a multiple of a vector: the old contents are not read first.
template <class T>
inline void stream(T* to, Vec<T> x) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)x);
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)x);
#else
  store(to, x);
#endif
}

// Called before other threads may read what was streamed.
inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Starts loading the cache line at an address, which need not be mapped. Without the empty statement, compilers take a
// function that only prefetches for one without effect and remove its calls.
template <int locality = 3>
inline void fetch_line(const void* at) {
  __builtin_prefetch(at, 0, locality);
  asm volatile("");
}

typedef VecOf<uint16_t, kLanes<float>>::type VecHalf;
typedef VecOf<uint32_t, kLanes<float>>::type VecBits;

inline VecBits load_bits(const uint16_t* from) {
  return __builtin_convertvector(*reinterpret_cast<const VecOf<uint16_t, kLanes<float>>::unaligned*>(from), VecBits);
}

template <class Compute>
inline Vec<float> load(const bfloat16* from) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (Vec<float>)((VecBits)bits << 16);
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return (Vec<float>)((VecBits)bits << 16);
#else
  return (Vec<float>)(load_bits(&from->bits) << 16);
#endif
}

inline Vec<float> widen_halves(VecHalf halves) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves);
#elif defined(__F16C__) && FASTATTN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)halves);
#elif defined(__F16C__)
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; i += 8) {
    __m128i some;
    std::memcpy(&some, reinterpret_cast<const char*>(&halves) + i * sizeof(float16), sizeof some);
    const __m256 part = _mm256_cvtph_ps(some);
    std::memcpy(reinterpret_cast<char*>(&x) + i * sizeof(float), &part, sizeof part);
  }
  return x;
#else
  const VecBits bits = __builtin_convertvector(halves, VecBits), magnitude = (bits & 0x7fffu) << 13;
  const Vec<float> finite = (Vec<float>)magnitude * 0x1p112f;  // the exponent's other bias; exact for denormals too
  const VecBits special = (VecBits)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Vec<float>)((VecBits)finite | special | (bits & 0x8000u) << 16);
#endif
}

template <class Compute>
inline Vec<float> load(const float16* from) {
  VecHalf halves;
  std::memcpy(&halves, from, sizeof halves);
  return widen_halves(halves);
}

template <class Compute>
inline Vec<float> load(const int8_t* from) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec<float>)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  VecInt<float> x;
  for (int i = 0; i < kLanes<float>; i++) x[i] = from[i];
  return __builtin_convertvector(x, Vec<float>);
#endif
}

// Widens by way of half precision: its exponent has one bit more, and its denormals include those of float8.
template <class Compute>
inline Vec<float> load(const float8* from) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 7);
  const __m256i above = _mm256_set1_epi16(int16_t(0xc000)), largest = _mm256_set1_epi16(int16_t(0xff80));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_or_si256(moved, above), largest);  // the sign fills both bits above
  const __m256i halves = _mm256_and_si256(moved, _mm256_set1_epi16(int16_t(0xbfff)));
  return widen_halves((VecHalf)_mm256_mask_mov_epi16(halves, nan, largest)) * 0x1p8f;  // the exponent's other bias
#else
#if defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  const VecHalf bytes = (VecHalf)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  VecHalf bytes;
  for (int i = 0; i < kLanes<float>; i++) bytes[i] = from[i].bits;
#endif
  const VecHalf magnitude = bytes & uint16_t(0x7f), nan = (VecHalf)(magnitude == uint16_t(0x7f));
  return widen_halves((bytes & uint16_t(0x80)) << 8 | magnitude << 7 | nan) * 0x1p8f;
#endif
}

template <class Compute>
inline Compute widen(Compute x) {
  return x;
}

template <class Compute>
inline float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class Compute>
inline float widen(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const float16 lanes[kLanes<float>] = {x};
  return load<float>(lanes)[0];
#endif
}

template <class Element>
Element narrow(float x);

template <>
inline float narrow<float>(float x) {
  return x;
}

template <>
inline bfloat16 narrow<bfloat16>(float x) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline float16 narrow<float16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and more
  if (bits < 0x38800000) {                                   // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  return {uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13))};
}

template <>
inline float8 narrow<float8>(float x) {  // to nearest even, of numbers up to 448 in size, and NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint8_t sign = uint8_t(bits >> 24 & 0x80);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint8_t(sign | 0x7f)};
  if (bits < 0x3c800000) {  // below 2^-6: adding 1.5 * 2^14 rounds to multiples of 2^-9
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0x1.8p14f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {uint8_t(sign | (bits & 0xf))};
  }
  return {uint8_t(sign | ((bits - 0x3c000000 + 0x7ffff + (bits >> 20 & 1)) >> 20))};
}

template <class Element>
inline double narrow(double x) {
  return x;
}

// Stores numbers rounded to the element type.
inline void store_narrow(float* to, Vec<float> x) { store(to, x); }
inline void store_narrow(double* to, Vec<double> x) { store(to, x); }

inline void store_narrow(bfloat16* to, Vec<float> x) {
  const VecBits bits = (VecBits)x;
  const VecBits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  const VecHalf half = __builtin_convertvector(x == x ? rounded : quiet, VecHalf);
  std::memcpy(to, &half, sizeof half);
}

inline void store_narrow(float16* to, Vec<float> x) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && FASTATTN_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; i++) to[i] = narrow<float16>(x[i]);
#endif
}

// -- Arithmetic ------------------------------------------------------------------------------------------------------

template <class T>
inline Vec<T> lane_numbers() {
  Vec<T> x;
  for (int i = 0; i < kLanes<T>; i++) x[i] = T(i);
  return x;
}

// The larger number, lane by lane; b if either is NaN. Compilers often do not make one instruction of the plain form.
template <class V>
inline V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, VecOf<float, 16>::type>) return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, VecOf<double, 8>::type>) return (V)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<V, VecOf<float, 8>::type>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, VecOf<double, 4>::type>) return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}

// The halves of a vector.
template <class V>
struct Halves {
  using T = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
  typename VecOf<T, sizeof(V) / sizeof(T) / 2>::type low, high;

  explicit Halves(V x) {
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
  }
};

template <class V>
inline auto largest_lane(V x) {
  if constexpr (sizeof x == 2 * sizeof x[0]) {
    return x[0] > x[1] ? x[0] : x[1];
  } else {
    const Halves<V> halves(x);
    return largest_lane(larger(halves.low, halves.high));
  }
}

// Adds the halves of a vector until `left` lanes are left, always in the same order.
template <int left, class V>
inline auto add_down_to(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  constexpr int lanes = sizeof(V) / sizeof(T);
  if constexpr (lanes == left) {
    return x;
  } else {
    typename VecOf<T, lanes / 2>::type low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return add_down_to<left>(low + high);
  }
}

template <class V>
inline auto sum_lanes(V x) {
  const auto two = add_down_to<2>(x);
  return two[0] + two[1];
}

// From each four lanes of a and the same four of b: the lanes at places first and second of a, then of b.
template <int first, int second, class T, int... I>
inline Vec<T> pick(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 4 < 2 ? 0 : int(sizeof...(I))) + I / 4 * 4 + (I % 2 == 0 ? first : second)...);
}

// sums[i] = the sum of the lanes of x[i], for `count` vectors. Four vectors share their shuffles.
template <int count, class T>
inline void sums_of_lanes(T* sums, const Vec<T>* x) {
  if constexpr (kLanes<T> < 4 || count % 4 != 0) {
    for (int i = 0; i < count; i++) sums[i] = sum_lanes(x[i]);
  } else {
    constexpr std::make_integer_sequence<int, kLanes<T>> all{};
    for (int i = 0; i < count; i += 4) {
      const Vec<T> ab = pick<0, 1, T>(x[i], x[i + 1], all) + pick<2, 3, T>(x[i], x[i + 1], all);
      const Vec<T> cd = pick<0, 1, T>(x[i + 2], x[i + 3], all) + pick<2, 3, T>(x[i + 2], x[i + 3], all);
      const auto four = add_down_to<4>(pick<0, 2, T>(ab, cd, all) + pick<1, 3, T>(ab, cd, all));
      std::memcpy(sums + i, &four, sizeof four);
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
