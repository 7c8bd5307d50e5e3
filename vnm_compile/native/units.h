// Operands of the gradients' products: elements of bf16 to double in units that a multiplication takes, transposed where
// they are read by column.

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast") // Inductor's flags turn fused multiply-adds off
#endif

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

namespace {

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
constexpr int64_t kLine = 16; // columns that are transposed at a time: lines that a cache holds

struct bf16 {
  uint16_t bits;
};

typedef float eight __attribute__((vector_size(32)));

inline float wide(float value) { return value; }
inline double wide(double value) { return value; }
inline float wide(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void narrow(float value, float &to) { to = value; }
inline void narrow(double value, double &to) { to = value; }
inline void narrow(float value, bf16 &to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  // To the nearest, ties to even.
  to.bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Eight elements that lie side by side, in one vector: left to itself, a compiler widens bf16 one by one.
inline eight wide_eight(const float *from) {
  eight result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
inline eight wide_eight(const bf16 *from) {
  typedef uint16_t halves __attribute__((vector_size(16)));
  typedef uint32_t words __attribute__((vector_size(32)));
  halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  words widened = __builtin_convertvector(bits, words) << 16;
  return (eight)widened;
}

template <class A> struct Vectors {
  typedef A type __attribute__((vector_size(kBytes)));
  static constexpr int64_t lanes = kBytes / sizeof(A);
  static type load(const A *from) {
    type result;
    std::memcpy(&result, from, kBytes);
    return result;
  }
  static void store(type value, A *to) { std::memcpy(to, &value, kBytes); }
};

// How operands of type S are multiplied: in units of `per` terms of a sum, which are added up as `Sum`.
template <class S, class A> struct Single {
  using Operand = S;
  using Unit = A;
  using Sum = A;
  static constexpr int64_t per = 1;
  static typename Vectors<A>::type add(typename Vectors<A>::type sum, typename Vectors<A>::type row, A scalar) {
    return sum + row * scalar;
  }
  // To what is there, which is zero, or value is: the unit of a term.
  static void put(Unit &to, S value, int64_t) { to += wide(value); }
};

#ifdef __AVX512BF16__
// Two bf16 side by side, the first in the lower half: what a dot product takes.
struct Pairs {
  using Operand = bf16;
  using Unit = uint32_t;
  using Sum = float;
  static constexpr int64_t per = 2;
  static Vectors<float>::type add(Vectors<float>::type sum, Vectors<uint32_t>::type row, uint32_t scalar) {
    __m512i all = _mm512_set1_epi32(int32_t(scalar));
    return (Vectors<float>::type)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)all);
  }
  static void put(Unit &to, bf16 value, int64_t term) {
    bf16 halves[2];
    std::memcpy(halves, &to, sizeof(to));
    narrow(wide(halves[term % 2]) + wide(value), halves[term % 2]);
    std::memcpy(&to, halves, sizeof(to));
  }
};
using Half = Pairs;
#else
using Half = Single<bf16, float>;
#endif

inline int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
template <class P> int64_t units(int64_t terms) { return (terms + P::per - 1) / P::per; }

// Operands as units [source][unit]: each row of them is a source, and what a unit holds lies side by side in it...
template <class P> struct Across {
  using S = typename P::Operand;
  const S *from;
  int64_t stride, width;
  typename P::Unit one(int64_t source, int64_t unit) const {
    typename P::Unit result{};
    for (int64_t term = unit * P::per; term < std::min(width, (unit + 1) * P::per); ++term)
      P::put(result, from[source * stride + term], term);
    return result;
  }
  bool whole(int64_t source, int64_t unit) const { return (unit + 8) * P::per <= width; }
  eight some(int64_t source, int64_t unit) const {
    const S *at = from + source * stride + unit * P::per;
    if constexpr (P::per == 1)
      return wide_eight(at);
    eight result;
    std::memcpy(&result, at, sizeof(result));
    return result;
  }
};

// ... or a source is `per` rows, and a unit holds what lies one below the other in them.
template <class P> struct Down {
  using S = typename P::Operand;
  const S *from;
  int64_t stride, rows, width;
  typename P::Unit one(int64_t source, int64_t unit) const {
    typename P::Unit result{};
    for (int64_t term = source * P::per; term < std::min(rows, (source + 1) * P::per); ++term)
      P::put(result, from[term * stride + unit], term);
    return result;
  }
  bool whole(int64_t source, int64_t unit) const { return unit + 8 <= width && (source + 1) * P::per <= rows; }
  eight some(int64_t source, int64_t unit) const {
    const S *at = from + source * P::per * stride + unit;
    eight result = wide_eight(at);
    if constexpr (P::per == 2) { // widened, a half is the upper one of its word
      typedef uint32_t words __attribute__((vector_size(32)));
      result = (eight)((words)wide_eight(at + stride) | (words)result >> 16);
    }
    return result;
  }
};

// 8 x 8 words, in registers where the compiler has shuffles; they are the smaller half of the work otherwise.
inline void transpose_square(eight r[8]) {
#if defined(__clang__) || __GNUC__ >= 12
  eight s[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = __builtin_shufflevector(s[i + k], s[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2 * k + 1] = __builtin_shufflevector(s[i + k], s[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  std::memcpy(r, s, sizeof(s));
#else
  for (int i = 0; i < 8; ++i)
    for (int k = 0; k < i; ++k)
      std::swap(reinterpret_cast<float *>(&r[i])[k], reinterpret_cast<float *>(&r[k])[i]);
#endif
}

// [sources][width] units as [width][`tile`], zeros past the last source.
template <class Operands, class U>
void transpose(const Operands &operands, int64_t sources, int64_t width, U *to, int64_t tile) {
  for (int64_t unit = 0; unit < width; unit += 8) {
    int64_t last = std::min(width, unit + 8), done = 0;
    if constexpr (sizeof(U) == sizeof(float))
      for (; done + 8 <= sources && last - unit == 8 && operands.whole(done + 7, unit); done += 8) {
        eight square[8];
        for (int i = 0; i < 8; ++i)
          square[i] = operands.some(done + i, unit);
        transpose_square(square);
        for (int i = 0; i < 8; ++i)
          std::memcpy(to + (unit + i) * tile + done, &square[i], sizeof(eight));
      }
    for (int64_t u = unit; u < last; ++u) {
      for (int64_t source = done; source < sources; ++source)
        to[u * tile + source] = operands.one(source, u);
      std::fill(to + u * tile + sources, to + (u + 1) * tile, U{});
    }
  }
}

// [sources][width] units as they are, in rows of `to_width`.
template <class Operands, class U>
void copy(const Operands &operands, int64_t sources, int64_t width, U *to, int64_t to_width) {
  for (int64_t source = 0; source < sources; ++source) {
    int64_t unit = 0;
    if constexpr (sizeof(U) == sizeof(float))
      for (; unit + 8 <= width && operands.whole(source, unit); unit += 8) {
        eight some = operands.some(source, unit);
        std::memcpy(to + source * to_width + unit, &some, sizeof(some));
      }
    for (; unit < width; ++unit)
      to[source * to_width + unit] = operands.one(source, unit);
  }
}

// And back.
template <class S, class A>
void transpose_back(const A *from, int64_t tile, int64_t count, int64_t width, S *to, int64_t stride) {
  for (int64_t first = 0; first < width; first += kLine)
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = first; c < std::min(width, first + kLine); ++c)
        narrow(from[c * tile + t], to[t * stride + c]);
}

} // namespace
