// rows_times_few_words: as rows_times_few_tokens, for bf16 and N = 2, on vectors of bf16 pairs.
//
//    values    | v0 v1 | v2 v3 | ...          32 of 16 groups, as stored
//    kept      | k0 k1 k2 k3 | ...            of 16 groups: 64 words, two registers
//    picked    | k[i0] k[i1] | ...            one permute of words; then one vdpbf16ps, a group a lane
#pragma once
#include "kept.h"
#include "sparse_rows.h"

namespace vnm {

#if defined(VNM_BF16_PAIRS)

constexpr int64_t kWordGroups = 16;

// Words from one token's kept activations to the next. Not a multiple of 4 KB: tables of several tokens, which are read
// side by side, would fall into the same few places of the L1 cache.
inline int64_t kept_words(int64_t groups) { return (groups * 4 + 63) / 64 * 64 + 32; }

// For each of 32 values the place of its column among the 64 kept ones of its 16 groups, from 8 bytes of metadata.
inline __m512i word_index(uint64_t codes) {
  alignas(64) static constexpr uint16_t kShift[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  alignas(64) static constexpr uint16_t kGroup[32] = {0,  0,  4,  4,  8,  8,  12, 12, 16, 16, 20, 20, 24, 24, 28, 28,
                                                      32, 32, 36, 36, 40, 40, 44, 44, 48, 48, 52, 52, 56, 56, 60, 60};
  const __m512i spread =
      _mm512_multishift_epi64_epi8(_mm512_load_si512(kShift), _mm512_set1_epi64(static_cast<int64_t>(codes)));
  return _mm512_ternarylogic_epi32(spread, _mm512_set1_epi16(3), _mm512_load_si512(kGroup), 0xEA);  // (s & 3) | group
}

// Of each of 4 vectors a sum in every quarter of a register.
inline __m512 sums_of_quarters(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
}

// The sums of the lanes of 16 vectors, given 4 in each of a, b, c and d by sums_of_quarters.
inline __m512 sums_of_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}

// sums [R][T] of R rows and T tokens, in U sums each; with `more`, add to them.
template <int T, int R, int U>
inline void rows_times_few_words(
    const uint16_t* kept, int64_t ldk, const at::BFloat16* values, int64_t ldv, const uint8_t* metadata, int64_t ldm,
    int64_t groups, bool more, float* sums) {
  __m512 sum[R][U][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[r][u][t] = _mm512_setzero_ps();
  const auto step = [&](int64_t g, size_t bytes, __mmask32 real, int u) __attribute__((always_inline)) {
    __m512i index[R], weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint64_t codes = 0;
      std::memcpy(&codes, metadata + r * ldm + g / 2, bytes);
      index[r] = word_index(codes);
      const at::BFloat16* from = values + r * ldv + g * 2;
      weight[r] = real == 0xFFFFFFFF ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(real, from);
      asm("" : "+v"(weight[r]));  // loaded once: the compiler would rather load again at every use
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const uint16_t* table = kept + t * ldk + g * 4;
      __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 32);
      if constexpr (R > 1) asm("" : "+v"(first), "+v"(second));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i picked = _mm512_permutex2var_epi16(first, index[r], second);
        sum[r][u][t] = _mm512_dpbf16_ps(sum[r][u][t], (__m512bh)weight[r], (__m512bh)picked);
      }
    }
  };
  const int64_t whole = groups / kWordGroups * kWordGroups, left = groups - whole;
  int64_t g = 0;
  for (; g + U * kWordGroups <= whole; g += U * kWordGroups) {
    prefetch_rows<R, U>(values + g * 2, ldv, metadata + g / 2, ldm);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) step(g + u * kWordGroups, 8, 0xFFFFFFFF, u);
  }
  for (; g < whole; g += kWordGroups) step(g, 8, 0xFFFFFFFF, 0);
  if (left > 0) step(whole, (left + 1) / 2, static_cast<__mmask32>((uint64_t{1} << (2 * left)) - 1), 0);
  if constexpr (R == 4 && T == 4 && U == 1) {
    const auto quarters = [&](int r) __attribute__((always_inline)) {
      return sums_of_quarters(sum[r][0][0], sum[r][0][1], sum[r][0][2], sum[r][0][3]);
    };
    const __m512 total = sums_of_lanes(quarters(0), quarters(1), quarters(2), quarters(3));
    _mm512_storeu_ps(sums, more ? _mm512_add_ps(_mm512_loadu_ps(sums), total) : total);
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum[r][0][t] = _mm512_add_ps(sum[r][0][t], sum[r][u][t]);
      const float total = _mm512_reduce_add_ps(sum[r][0][t]);
      sums[r * T + t] = more ? sums[r * T + t] + total : total;
    }
}

// tile [tokens][ldt] = x @ rows.T for `rows` rows of one block and a few tokens. Four tokens pass over all rows before the
// next four do: the rows stay in the L2, and so much of their tables as is looked up at a time in the L1.
inline void block_times_few_words(
    const uint16_t* kept, int64_t ldk, const at::BFloat16* values, int64_t ldv, const uint8_t* metadata, int64_t ldm,
    int64_t groups, int64_t rows, int64_t tokens, float* tile, int64_t ldt) {
  constexpr int64_t kMostGroups = 640;
  alignas(64) float sums[kMostRows * 4];
  for (int64_t t = 0; t < tokens; t += 4) {
    const auto pass = [&](auto count, auto together, auto steps) {
      constexpr int T = decltype(count)::value, R = decltype(together)::value, U = decltype(steps)::value;
      const int64_t parts = T < 4 ? 1 : (groups + kMostGroups - 1) / kMostGroups;
      const int64_t part = (groups + parts * kWordGroups - 1) / (parts * kWordGroups) * kWordGroups;
      for (int64_t g = 0; g < groups; g += part) {
        const auto multiply = [&](auto side, int64_t r) __attribute__((always_inline)) {
          rows_times_few_words<T, decltype(side)::value, U>(
              kept + t * ldk + g * 4, ldk, values + r * ldv + g * 2, ldv, metadata + r * ldm + g / 2, ldm,
              std::min(part, groups - g), g > 0, sums + r * T);
        };
        int64_t r = 0;
        for (; r + R <= rows; r += R) multiply(together, r);
        for (; r < rows; ++r) multiply(Is<1>(), r);
      }
      transpose_tile(sums, T, rows, T, tile + t * ldt, ldt);
    };
    for_few_tokens(tokens - t, pass);
  }
}

#endif

}  // namespace vnm
