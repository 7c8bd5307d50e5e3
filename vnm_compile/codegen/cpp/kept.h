// gather_kept: the activations in the columns that a block keeps, side by side.
#pragma once
#include "rounded.h"
#include "sparse_rows.h"

namespace vnm {

#if defined(CPU_CAPABILITY_AVX512)

// Of 32 kept activations the group.
alignas(64) constexpr uint16_t kQuad[32] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                            4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7};

// `lanes` of two registers of x, by their places in it.
inline __m512i pick(__mmask32 lanes, const float* x, int64_t width, __m512i places) {
  const auto low = static_cast<__mmask16>((uint64_t{1} << std::min<int64_t>(width, 16)) - 1);
  const auto high = static_cast<__mmask16>((uint64_t{1} << std::max<int64_t>(width - 16, 0)) - 1);
  const __m512i first = _mm512_maskz_loadu_epi32(low, x), second = _mm512_maskz_loadu_epi32(high, x + 16);
  return _mm512_maskz_permutex2var_epi32(static_cast<__mmask16>(lanes), first, places, second);
}
template <typename S>
inline __m512i pick(__mmask32 lanes, const S* x, int64_t width, __m512i places) {
  const auto low = static_cast<__mmask32>((uint64_t{1} << std::min<int64_t>(width, 32)) - 1);
  const auto high = static_cast<__mmask32>((uint64_t{1} << std::max<int64_t>(width - 32, 0)) - 1);
  const __m512i first = _mm512_maskz_loadu_epi16(low, x), second = _mm512_maskz_loadu_epi16(high, x + 32);
  return _mm512_maskz_permutex2var_epi16(lanes, first, places, second);
}

#endif

#if defined(VNM_BYTE_QUADS)
// As gather_kept below, of bytes, whose zero is kByteZero: one permute of two registers picks what up to 16 groups keep.
template <typename C>
inline bool gather_bytes(
    const uint8_t* x, int64_t ldx, int64_t tokens, const C* columns, int64_t groups, int64_t m, int64_t in_features,
    uint8_t* kept, int64_t ldk) {
  constexpr int64_t kRegister = 64;
  const int64_t together = std::min<int64_t>(kRegister / 4, 2 * kRegister / m);
  if (sizeof(C) != 1 || together == 0) return false;
  const __m512i width_of_group = _mm512_set1_epi16(static_cast<int16_t>(m));
  const __m512i half = _mm512_mullo_epi16(_mm512_load_si512(kQuad), width_of_group);
  const __m512i other = _mm512_add_epi16(half, _mm512_slli_epi16(width_of_group, 3));
  const __m512i start =
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(half)), _mm512_cvtepi16_epi8(other), 1);
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(kByteZero));
  for (int64_t g = 0; g < groups; g += together) {
    const __mmask64 lanes = first_lanes(4 * std::min(together, groups - g));
    const int64_t width = std::min(2 * kRegister, in_features - g * m);
    const __mmask64 low = first_lanes(width), high = first_lanes(width - kRegister);
    const __m512i places = _mm512_add_epi8(_mm512_maskz_loadu_epi8(lanes, columns + g * 4), start);
    for (int64_t t = 0; t < tokens; ++t) {
      const uint8_t* from = x + t * ldx + g * m;
      const __m512i first = _mm512_mask_loadu_epi8(zero, low, from);
      const __m512i second = _mm512_mask_loadu_epi8(zero, high, from + kRegister);
      _mm512_storeu_si512(kept + t * ldk + g * 4, _mm512_maskz_permutex2var_epi8(lanes, first, places, second));
    }
  }
  return true;
}
#endif

// kept [tokens][ldk]: of each group the 4 kept activations, 0 for columns past the last one; as floats, or as they are in x
// [tokens][ldx]. Whole registers are stored, so that up to 64 bytes more than 4 * groups are written, with zeros.
template <typename S, typename E, typename C>
inline void gather_kept(
    const S* x, int64_t ldx, int64_t tokens, const C* columns, int64_t groups, int64_t m, int64_t in_features, E* kept,
    int64_t ldk) {
#if defined(VNM_BYTE_QUADS)
  if constexpr (kQuads<S>)
    if (gather_bytes(x, ldx, tokens, columns, groups, m, in_features, kept, ldk)) return;
#endif
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(C) == 1 && !kQuads<S>) {
    // Where a few groups are no wider than two registers, one permute picks all that they keep.
    constexpr int64_t kRegister = 64 / static_cast<int64_t>(sizeof(S));
    const int64_t together = std::min<int64_t>(kRegister / 4, 2 * kRegister / m);
    if (together > 0) {
      const auto places = [&](int64_t g, __mmask32 lanes) {
        if constexpr (sizeof(S) == 2) {
          const __m512i start =
              _mm512_mullo_epi16(_mm512_load_si512(kQuad), _mm512_set1_epi16(static_cast<int16_t>(m)));
          return _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(lanes, columns + g * 4)), start);
        } else {
          const __m512i quad = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
          const __m512i start = _mm512_mullo_epi32(quad, _mm512_set1_epi32(static_cast<int>(m)));
          const auto low = static_cast<__mmask16>(lanes);
          return _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(low, columns + g * 4)), start);
        }
      };
      for (int64_t t = 0; t < tokens; ++t) {
        const auto take = [&](int64_t g, int64_t count, int64_t width) __attribute__((always_inline)) {
          const auto lanes = static_cast<__mmask32>((uint64_t{1} << (4 * count)) - 1);
          const __m512i picked = pick(lanes, x + t * ldx + g * m, width, places(g, lanes));
          E* to = kept + t * ldk + g * 4;
          if constexpr (sizeof(S) == sizeof(E)) {
            _mm512_storeu_si512(to, picked);
          } else {
            _mm512_storeu_ps(to, widen(_mm512_castsi512_si256(picked), x));
            if (count > 4) _mm512_storeu_ps(to + 16, widen(_mm512_extracti64x4_epi64(picked, 1), x));
          }
        };
        int64_t g = 0;
        for (; g + together <= groups && g * m + 2 * kRegister <= in_features; g += together)
          take(g, together, 2 * kRegister);
        for (; g < groups; g += together)
          take(g, std::min(together, groups - g), std::min(2 * kRegister, in_features - g * m));
      }
      return;
    }
  }
#endif
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < groups * 4; ++i) {
      const int64_t column = i / 4 * m + columns[i];
      const bool real = column < in_features;
      if constexpr (std::is_same_v<E, float>)
        kept[t * ldk + i] = real ? static_cast<float>(x[t * ldx + column]) : 0.f;
      else if constexpr (kQuads<S>)
        kept[t * ldk + i] = real ? x[t * ldx + column] : kByteZero;
      else
        kept[t * ldk + i] = real ? x[t * ldx + column].x : 0;
    }
  }
}

}  // namespace vnm
