// How kernels read the values of a weight's rows: floats as they are stored, or integers of which so many share a scale.
//
// Integers of up to 8 bits are floats, bf16 ones too, without rounding. So they are multiplied as they are, straight from
// memory, and what belongs to one scale is scaled once, when it is summed up:
//
//     y = sum of groups ( scale * sum of the group's values ( level * activation ) )
#pragma once
#include "sparse_rows.h"

namespace vnm {

// kGroup of values without scales, and of a row with one.
constexpr int64_t kNone = 0, kWholeRow = std::numeric_limits<int64_t>::max();

// Values that are stored as floats.
template <typename S>
struct FloatValues {
  using Stored = S;
  static constexpr int64_t kGroup = kNone;
  const S* values;
  int64_t ld;  // elements from one row to the next
  const S* at(int64_t r, int64_t i) const { return values + r * ld + i; }
  FloatValues rows(int64_t r) const { return {values + r * ld, ld}; }
  static constexpr int64_t bytes(int64_t count) { return count * static_cast<int64_t>(sizeof(S)); }

  // `count` values of row r from value i on, as floats.
  void unpack(int64_t r, int64_t i, int64_t count, float* __restrict to) const {
    const S* from = at(r, i);
    for (int64_t k = 0; k < count; ++k) to[k] = static_cast<float>(from[k]);
  }
#if defined(CPU_CAPABILITY_AVX512)
  static __m512 floats(const S* from, __mmask16 real) { return load_values(from, real); }
  static __m512i pairs(const S* from, __mmask32 real) {
    if (__builtin_constant_p(real) && real == 0xFFFFFFFF) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(real, from);
  }
  __m512 scale(int64_t, int64_t) const { return _mm512_set1_ps(1.f); }
#endif
};

#if defined(CPU_CAPABILITY_AVX512)

inline __m512 broadcast_scale(const float* scale) { return _mm512_set1_ps(*scale); }
inline __m512 broadcast_scale(const at::BFloat16* scale) {
  // In the upper half of every lane, which makes a float of it.
  return _mm512_castsi512_ps(_mm512_maskz_set1_epi16(0xAAAAAAAA, static_cast<int16_t>(scale->x)));
}
inline __m512 broadcast_scale(const at::Half* scale) { return _mm512_set1_ps(static_cast<float>(*scale)); }

#if defined(VNM_BF16_PAIRS)
// Floats that bf16 represents, as bf16: the first 16 in the lower half.
inline __m512i exact_pairs(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}
#endif

// Levels of 8 bits.
inline __m512 level_floats(const int8_t* from, __mmask16 real) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(real, from)));
}

// Levels of 4 bits, the first of a byte in its lower half; a byte whose upper half is not real is.
inline uint32_t bytes_of_halves(uint32_t real) {
  const uint32_t halves = real | real >> 1;
  return _pext_u32(halves, 0x55555555);
}
inline __m512 level_floats(const uint8_t* from, __mmask16 real) {
  const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const auto bytes = static_cast<__mmask16>(bytes_of_halves(real));
  const __m512i both = _mm512_cvtepu8_epi64(_mm_maskz_loadu_epi8(bytes, from));
  // The lowest 4 bits of a lane look up its level.
  const __m512i halves = _mm512_or_si512(both, _mm512_slli_epi64(both, 28));
  return _mm512_maskz_permutexvar_ps(real, halves, levels);
}

#if defined(VNM_BF16_PAIRS)
inline __m512i level_pairs(const int8_t* from, __mmask32 real) {
  return exact_pairs(
      level_floats(from, static_cast<__mmask16>(real)), level_floats(from + 16, static_cast<__mmask16>(real >> 16)));
}
inline __m512i level_pairs(const uint8_t* from, __mmask32 real) {
  // bf16 of 0 to 7 and -8 to -1, twice: the lowest 5 bits of a lane look up, of which the fifth is another level's.
  alignas(64) static constexpr uint16_t kLevels[32] = {
      0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0,
      0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
      0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};
  // A byte a lane of 32 bits, as it is in the lower half, and shifted by 4 in the upper one.
  const auto bytes = static_cast<__mmask16>(bytes_of_halves(real));
  const __m512i both = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(bytes, from));
  const __m512i halves = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2424'2020'0404'0000), both);
  return _mm512_maskz_permutexvar_epi16(real, halves, _mm512_load_si512(kLevels));
}
#endif

#endif

#if defined(VNM_BYTE_QUADS)
// 64 levels as bytes, of which the first `count` are real.
inline __m512i level_bytes(const int8_t* from, int64_t count) {
  return _mm512_maskz_loadu_epi8(first_lanes(count), from);
}
inline __m512i level_bytes(const uint8_t* from, int64_t count) {
  const auto bytes = static_cast<__mmask32>(first_lanes((std::min<int64_t>(count, 64) + 1) / 2));
  const __m512i levels = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  const __m512i both = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(bytes, from));
  const __m512i halves = _mm512_and_si512(_mm512_or_si512(both, _mm512_slli_epi16(both, 4)), _mm512_set1_epi8(15));
  return _mm512_maskz_shuffle_epi8(first_lanes(count), levels, halves);
}
#endif

// Levels L (int8_t, or uint8_t for two of 4 bits), of which Group of a row share a scale.
template <typename S, typename L, int64_t Group>
struct LevelValues {
  using Stored = L;
  static constexpr int64_t kGroup = Group;
  static constexpr int64_t kEach = std::is_same_v<L, uint8_t> ? 2 : 1;  // levels of a byte
  const L* levels;
  const S* scales;
  int64_t ld, lds;
  const L* at(int64_t r, int64_t i) const { return levels + r * ld + i / kEach; }
  LevelValues rows(int64_t r) const { return {levels + r * ld, scales + r * lds, ld, lds}; }
  static constexpr int64_t bytes(int64_t count) { return count / kEach; }
  const S* scale_at(int64_t r, int64_t i) const { return scales + r * lds + i / Group; }

  void unpack(int64_t r, int64_t i, int64_t count, float* __restrict to) const {
    const L* from = at(r, i);
    const auto scale = static_cast<float>(*scale_at(r, i));
    for (int64_t k = 0; k < count; ++k) {
      // The sign of half a byte is its highest bit.
      const int32_t level = kEach == 1 ? from[k] : ((from[k / 2] >> (k % 2 * 4) & 15) ^ 8) - 8;
      to[k] = static_cast<float>(level) * scale;
    }
  }
#if defined(CPU_CAPABILITY_AVX512)
  static __m512 floats(const L* from, __mmask16 real) { return level_floats(from, real); }
#if defined(VNM_BF16_PAIRS)
  static __m512i pairs(const L* from, __mmask32 real) { return level_pairs(from, real); }
#endif
#if defined(VNM_BYTE_QUADS)
  static __m512i bytes_of(const L* from, int64_t count) { return level_bytes(from, count); }
#endif
  __m512 scale(int64_t r, int64_t i) const { return broadcast_scale(scale_at(r, i)); }
#endif
};

// Whether sums of groups of values are scaled, where a row goes on.
template <typename W>
constexpr bool kScalesGroups = W::kGroup != kNone && W::kGroup != kWholeRow;

#if defined(CPU_CAPABILITY_AVX512)

// Sums of R rows and T tokens.
template <int R, int T>
inline __attribute__((always_inline)) void clear(__m512 (&sum)[R][T]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[r][t] = _mm512_setzero_ps();
}

// sum += part, times the scales of value i of each row.
template <typename W, int R, int T>
inline __attribute__((always_inline)) void add_scaled(
    const __m512 (&part)[R][T], const W& weight, int64_t i, __m512 (&sum)[R][T]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 scale = weight.scale(r, i);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[r][t] = _mm512_fmadd_ps(part[r][t], scale, sum[r][t]);
  }
}

// The K sums of steps added up in the first, and scaled where a row has one scale.
template <typename W, int K, int R, int T>
inline __attribute__((always_inline)) void finish(__m512 (&sum)[K][R][T], const W& weight) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int u = 1; u < K; ++u) sum[0][r][t] = _mm512_add_ps(sum[0][r][t], sum[u][r][t]);
      if constexpr (W::kGroup == kWholeRow) sum[0][r][t] = _mm512_mul_ps(sum[0][r][t], weight.scale(r, 0));
    }
}

#endif

}  // namespace vnm
