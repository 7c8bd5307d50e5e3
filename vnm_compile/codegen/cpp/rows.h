// Rows of a weight's values, as the kernels read them: where they lie, or, where values are quantised, decoded into a buffer
// that stays in the cache: integers are read from memory once, and what multiplies knows floats only.
#pragma once
#include "sparse_rows.h"

namespace vnm {

// Values that are stored as the kernels multiply them.
template <typename S>
struct StoredRows {
  const S* values;
  int64_t ld;  // from one row to the next
  // Rows that are asked for at a time where tokens are few.
  static constexpr int64_t kTogether = kMostRows;
  const S* at(int64_t first, int64_t) const { return values + first * ld; }
};

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, at::Half* to) { *to = static_cast<at::Half>(x); }
inline void narrow(float x, at::BFloat16* to) {
  // To the nearest, ties to even; without a branch for NaN, which no product of an integer and a scale is but where the
  // scale is one, whose bits the addition leaves a NaN's.
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->x = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `count` levels of one row, all of one scale, as S. `levels` of 4 bits begin at a whole byte.
template <typename S>
inline void decode(const int8_t* levels, float scale, int64_t count, S* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(static_cast<float>(levels[i]) * scale, to + i);
}
template <typename S>
inline void decode(const uint8_t* levels, float scale, int64_t count, S* to) {
  const int64_t pairs = count / 2;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const auto byte = static_cast<int32_t>(levels[i]);
    narrow(static_cast<float>((byte ^ 8) % 16 - 8) * scale, to + 2 * i);
    narrow(static_cast<float>((byte >> 4 ^ 8) - 8) * scale, to + 2 * i + 1);
  }
  if (count % 2) narrow(static_cast<float>((levels[pairs] ^ 8) % 16 - 8) * scale, to + count - 1);
}

// Levels L (int8_t, or uint8_t for two of 4 bits) of `count` values a row, `Group` of which share a scale.
template <typename S, typename L, int64_t Group>
struct QuantisedRows {
  const L* levels;
  const S* scales;
  S* buffer;  // of as many rows as are asked for at a time
  int64_t count, ldl, lds, ld;
  // So few that they stay in the L1 cache from decoding to multiplying.
  static constexpr int64_t kTogether = 4;
  const S* at(int64_t first, int64_t rows) const {
    constexpr int64_t kEach = sizeof(L) == 1 && std::is_same_v<L, uint8_t> ? 2 : 1;
    for (int64_t r = 0; r < rows; ++r) {
      const L* from = levels + (first + r) * ldl;
      const S* scale = scales + (first + r) * lds;
      for (int64_t i = 0; i < count; i += Group)
        decode(from + i / kEach, static_cast<float>(scale[i / Group]), std::min(Group, count - i), buffer + r * ld + i);
    }
    return buffer;
  }
};

}  // namespace vnm
