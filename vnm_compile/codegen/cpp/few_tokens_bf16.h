// rows_times_few_words: as rows_times_few_tokens, for bf16 and N = 2, on vectors of bf16 pairs.
//
//    values    | v0 v1 | v2 v3 | ...          32 of 16 groups, as stored
//    kept      | k0 k1 k2 k3 | ...            of 16 groups: 64 words, two registers
//    picked    | k[i0] k[i1] | ...            one permute of words; then one vdpbf16ps, a group a lane
#pragma once
#include "kept.h"
#include "rows.h"
#include "sparse_rows.h"

namespace vnm {

#if defined(VNM_BF16_PAIRS)

// Groups of a step, and those of which a part of a row has a multiple: no scale is of two parts.
constexpr int64_t kWordGroups = 16, kPartGroups = 64;

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

// sums [R][T] of R rows and T tokens over the groups from `start` to `stop`; with `more`, add to them. Steps are added in turn
// to U sums, or, where groups of values are scaled, to one for each of these. Both ends lie at multiples of kPartGroups, but
// for that of a row.
template <int T, int R, int U, typename W>
inline void rows_times_few_words(
    const uint16_t* kept, int64_t ldk, const W& weight, const uint8_t* metadata, int64_t ldm, int64_t start, int64_t stop,
    bool more, float* sums) {
  constexpr bool kScaled = kScalesGroups<W>;
  constexpr int kRun = kScaled ? static_cast<int>(W::kGroup / (2 * kWordGroups)) : 1;  // steps that share a scale
  constexpr int kSums = kScaled ? 1 : U, kTurn = std::max(kRun, U);
  using Sums = __m512[R][T];
  Sums sum[kSums];
#pragma GCC unroll 4
  for (int u = 0; u < kSums; ++u) clear(sum[u]);
  const auto step = [&](int64_t g, size_t bytes, __mmask32 real, Sums& to) __attribute__((always_inline)) {
    __m512i index[R], values[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint64_t codes = 0;
      std::memcpy(&codes, metadata + r * ldm + g / 2, bytes);
      index[r] = word_index(codes);
      values[r] = W::pairs(weight.at(r, g * 2), real);
      asm("" : "+v"(values[r]));  // loaded once: the compiler would rather load again at every use
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const uint16_t* table = kept + t * ldk + g * 4;
      __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 32);
      if constexpr (R > 1) asm("" : "+v"(first), "+v"(second));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i picked = _mm512_permutex2var_epi16(first, index[r], second);
        to[r][t] = _mm512_dpbf16_ps(to[r][t], (__m512bh)values[r], (__m512bh)picked);
      }
    }
  };
  // Steps that share a scale, of all of which as many groups are real.
  const auto run = [&](int64_t g, auto steps, size_t bytes, __mmask32 real) __attribute__((always_inline)) {
    Sums part;
    clear(part);
#pragma GCC unroll 4
    for (int s = 0; s < decltype(steps)::value; ++s) step(g + s * kWordGroups, bytes, real, part);
    add_scaled(part, weight, g * 2, sum[0]);
  };
  const int64_t whole = start + (stop - start) / kWordGroups * kWordGroups, left = stop - whole;
  int64_t g = start;
  for (; g + kTurn * kWordGroups <= whole; g += kTurn * kWordGroups) {
    prefetch_rows<R, W::bytes(2 * kTurn * kWordGroups), W::bytes(4)>(weight.at(0, g * 2), weight.ld, metadata + g / 2, ldm);
#pragma GCC unroll 4
    for (int u = 0; u < kTurn; u += kRun) {
      if constexpr (kScaled)
        run(g + u * kWordGroups, Is<kRun>(), 8, 0xFFFFFFFF);
      else
        step(g + u * kWordGroups, 8, 0xFFFFFFFF, sum[u]);
    }
  }
  const auto last = [&](int64_t from, size_t bytes, __mmask32 real) __attribute__((always_inline)) {
    if constexpr (kScaled)
      run(from, Is<1>(), bytes, real);
    else
      step(from, bytes, real, sum[0]);
  };
  for (; g < whole; g += kWordGroups) last(g, 8, 0xFFFFFFFF);
  if (left > 0) last(whole, (left + 1) / 2, static_cast<__mmask32>((uint64_t{1} << (2 * left)) - 1));
  finish(sum, weight);
  if constexpr (T == 4 && (R == 4 || R == 2)) {
    const auto quarters = [&](int r) __attribute__((always_inline)) {
      return sums_of_quarters(sum[0][r][0], sum[0][r][1], sum[0][r][2], sum[0][r][3]);
    };
    const __m512 first = quarters(0), second = quarters(1);
    const __m512 total = R == 4 ? sums_of_lanes(first, second, quarters(R - 2), quarters(R - 1))
                                : sums_of_lanes(first, second, first, second);
    const auto lanes = static_cast<__mmask16>((1u << (R * T)) - 1);
    _mm512_mask_storeu_ps(sums, lanes, more ? _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, sums), total) : total);
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const float total = _mm512_reduce_add_ps(sum[0][r][t]);
      sums[r * T + t] = more ? sums[r * T + t] + total : total;
    }
}

// tile [tokens][ldt] = x @ rows.T for `rows` rows of one block and a few tokens. Four tokens pass over all rows before the
// next four do: the rows stay in the L2, and so much of their tables as is looked up at a time in the L1.
template <typename W>
inline void block_times_few_words(
    const uint16_t* kept, int64_t ldk, const W& weight, const uint8_t* metadata, int64_t ldm, int64_t groups, int64_t rows,
    int64_t tokens, float* tile, int64_t ldt) {
  constexpr int64_t kMostGroups = 640;
  alignas(64) float sums[kMostRows * 4];
  for (int64_t t = 0; t < tokens; t += 4) {
    const auto pass = [&](auto count, auto together, auto steps) {
      constexpr int T = decltype(count)::value, R = decltype(together)::value, U = decltype(steps)::value;
      const int64_t parts = T < 4 ? 1 : (groups + kMostGroups - 1) / kMostGroups;
      const int64_t part = (groups + parts * kPartGroups - 1) / (parts * kPartGroups) * kPartGroups;
      for (int64_t g = 0; g < groups; g += part) {
        const auto multiply = [&](auto side, int64_t r) __attribute__((always_inline)) {
          rows_times_few_words<T, decltype(side)::value, U>(
              kept + t * ldk, ldk, weight.rows(r), metadata + r * ldm, ldm, g, std::min(g + part, groups), g > 0,
              sums + r * T);
        };
        int64_t r = 0;
        for (; r + R <= rows; r += R) multiply(together, r);
        for (; r < rows; ++r) multiply(Is<1>(), r);
      }
      transpose_tile(sums, T, rows, T, tile + t * ldt, ldt);
    };
    for_few_tokens<kScalesGroups<W>>(tokens - t, pass);
  }
}

#endif

}  // namespace vnm
