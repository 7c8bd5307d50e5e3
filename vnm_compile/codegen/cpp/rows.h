// Rows of a weight's values, as the kernels read them: where they lie, or, where values are quantised, decoded into a buffer
// that stays in the cache: integers are read from memory once, and what multiplies knows floats only.
#pragma once
#include "sparse_rows.h"

namespace vnm {

// Rows that stay in the L1 cache from one pass over few tokens to the next, and from decoding to multiplying.
constexpr int64_t kCachedRows = 4;

// Values that are stored as the kernels multiply them.
template <typename S>
struct StoredRows {
  const S* values;
  int64_t ld;  // from one row to the next
  // Rows that are asked for at a time where tokens are few.
  static constexpr int64_t kTogether = kMostRows;
  const S* at(int64_t first, int64_t) const { return values + first * ld; }
};

// Floats as S, to the nearest.
inline void narrow(const float* from, int64_t count, at::BFloat16* to) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    at::vec::convert_float_bfloat16(Vec::loadu(from + i), Vec::loadu(from + i + kLanes)).store(to + i);
  for (; i < count; ++i) to[i] = static_cast<at::BFloat16>(from[i]);
}
inline void narrow(const float* from, int64_t count, at::Half* to) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    at::vec::convert_float_half(Vec::loadu(from + i), Vec::loadu(from + i + kLanes)).store(to + i);
  for (; i < count; ++i) to[i] = static_cast<at::Half>(from[i]);
}

// `count` levels that share a scale, as floats. Levels of 4 bits begin at a whole byte.
inline void decode(const int8_t* __restrict levels, float scale, int64_t count, float* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(levels[i]) * scale;
}
inline void decode(const uint8_t* __restrict levels, float scale, int64_t count, float* __restrict to) {
  const int64_t pairs = count / 2;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    // The sign of a half is its highest bit.
    const int32_t low = ((levels[i] & 15) ^ 8) - 8, high = ((levels[i] >> 4) ^ 8) - 8;
    to[2 * i] = static_cast<float>(low) * scale;
    to[2 * i + 1] = static_cast<float>(high) * scale;
  }
  if (count % 2) to[count - 1] = static_cast<float>(((levels[pairs] & 15) ^ 8) - 8) * scale;
}

// Levels L (int8_t, or uint8_t for two of 4 bits) of `count` values a row, `Group` of which share a scale.
template <typename S, typename L, int64_t Group>
struct QuantisedRows {
  const L* levels;
  const S* scales;
  S* buffer;  // of as many rows as are asked for at a time
  int64_t count, ldl, lds, ld;
  static constexpr int64_t kTogether = kCachedRows;
  const S* at(int64_t first, int64_t rows) const {
    constexpr int64_t kEach = std::is_same_v<L, uint8_t> ? 2 : 1;  // levels of a byte
    constexpr int64_t kPart = std::min<int64_t>(Group, 256);
    alignas(64) float floats[kPart];
    for (int64_t r = 0; r < rows; ++r) {
      const L* from = levels + (first + r) * ldl;
      const S* scale = scales + (first + r) * lds;
      S* to = buffer + r * ld;
      for (int64_t i = 0; i < count; i += kPart) {
        const int64_t part = std::min(kPart, count - i);
        const auto s = static_cast<float>(scale[i / Group]);
        if constexpr (std::is_same_v<S, float>) {
          decode(from + i / kEach, s, part, to + i);
        } else {
          decode(from + i / kEach, s, part, floats);
          narrow(floats, part, to + i);
        }
      }
    }
    return buffer;
  }
};

}  // namespace vnm
