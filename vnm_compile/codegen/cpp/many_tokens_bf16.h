// rows_times_panel: as rows_times_tokens, for bf16 and N = 2, on pairs of columns.
//
// vdpbf16ps adds two products a lane, so that the four kept columns of a group are two pairs, whichever two of them a row
// keeps. A row is expanded to all four, zeros included: twice the arithmetic, but a dense loop, whose activations serve
// several rows from registers. Taking only the row's own two columns would load the activations anew for every row.
//
//     values    | v0 v1 | v2 v3 | ...          of 8 groups, as stored
//     mask      0110 1001 ...                  a bit for each kept column, from the indices
//     expanded  | 0 v0 v1 0 | v2 0 0 v3 | ...  one vpexpandw
//
//     panel [pair][tokens] of (x of a column, x of the next), 32 bits together, laid out once for all rows of a block
//     acc [rows][tokens] += expanded pair, broadcast, times panel
#pragma once
#include "sparse_rows.h"

namespace vnm {

#if defined(VNM_BF16_PAIRS)

// Groups of a panel: its activations, expanded rows and sums fit into an L1 of 48 KB.
constexpr int64_t kPanelGroups = 32, kPanelPairs = 2 * kPanelGroups;
// From one expanded row to the next: not a power of two, so that rows read side by side lie in different places of the L1.
constexpr int64_t kPanelStride = kPanelPairs + 16;
// Vectors of tokens in a panel, and rows whose sums fit into the registers beside them.
constexpr int kPanelVectors = 2, kPanelRows = 8;

// panel [pairs][NV vectors]: the tokens of two columns in turn.
template <int NV>
inline void lay_out_panel(const uint16_t* xt, const int32_t* offsets, int64_t pairs, uint32_t* panel) {
  static_assert(NV == 1 || NV == 2);
  // Words of the lower and of the upper half of 32 tokens, those of two columns in turn.
  alignas(64) static constexpr uint16_t kLower[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i lower = _mm512_load_si512(kLower), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  const auto load = [](const uint16_t* from) {
    return NV == 2 ? _mm512_loadu_si512(from)
                   : _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512i first = load(xt + offsets[2 * p]), second = load(xt + offsets[2 * p + 1]);
    uint32_t* to = panel + p * NV * kLanes;
    _mm512_store_si512(to, _mm512_permutex2var_epi16(first, lower, second));
    if constexpr (NV == 2) _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(first, upper, second));
  }
}

// For each half byte of metadata, which holds the two indices of a group, a bit for each of the 4 columns that are kept.
inline __m128i kept_masks(__m128i metadata) {
  const __m128i table = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8), half = _mm_set1_epi8(15);
  const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(metadata, half));
  const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(metadata, 4), half));
  return _mm_or_si128(low, _mm_slli_epi16(high, 4));
}

// Fetch of a row what the next panel is the first to touch, wherever in a cache line it starts.
inline void prefetch_panel(const at::BFloat16* values, const uint8_t* metadata) {
  __builtin_prefetch(values + kPanelGroups * 2 + 31, 0, 2);
  __builtin_prefetch(values + kPanelGroups * 2 + 63, 0, 2);
  __builtin_prefetch(metadata + kPanelGroups / 2 + 15, 0, 2);
}

// Up to kPanelGroups groups of a row, 4 columns each; `expanded` [groups * 2] up to a whole vector.
inline void expand_row(const at::BFloat16* values, const uint8_t* metadata, int64_t groups, uint32_t* expanded) {
  constexpr int64_t kVectors = kPanelGroups / 8;
  alignas(16) uint32_t masks[kVectors];
  const auto store = [&](int64_t i, __m256i kept) {
    _mm512_store_si512(expanded + i * kLanes, _mm512_maskz_expand_epi16(masks[i], _mm512_castsi256_si512(kept)));
  };
  if (groups == kPanelGroups) {
    _mm_store_si128(
        reinterpret_cast<__m128i*>(masks), kept_masks(_mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata))));
#pragma GCC unroll 4
    for (int64_t i = 0; i < kVectors; ++i)
      store(i, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i * 16)));
    return;
  }
  const auto bytes = static_cast<__mmask16>((1u << ((groups + 1) / 2)) - 1);
  _mm_store_si128(reinterpret_cast<__m128i*>(masks), kept_masks(_mm_maskz_loadu_epi8(bytes, metadata)));
  for (int64_t i = 0; i * 8 < groups; ++i) {
    const auto real = static_cast<__mmask16>((1u << (2 * std::min<int64_t>(8, groups - i * 8))) - 1);
    store(i, _mm256_maskz_loadu_epi16(real, values + i * 16));
  }
}

// acc [R][NV vectors] += R expanded rows times a panel.
template <int NV, int R>
inline void rows_times_panel(const uint32_t* panel, const uint32_t* expanded, int64_t pairs, float* acc) {
  __m512 sum[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_load_ps(acc + (r * NV + v) * kLanes);
#pragma GCC unroll 2
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh tokens[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) tokens[v] = (__m512bh)_mm512_load_si512(panel + (p * NV + v) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh w = (__m512bh)_mm512_set1_epi32(static_cast<int>(expanded[r * kPanelStride + p]));
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], tokens[v], w);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) _mm512_store_ps(acc + (r * NV + v) * kLanes, sum[r][v]);
}

// One panel for NV vectors of tokens and all rows.
template <int NV>
inline void block_times_panel(
    const uint16_t* xt, const int32_t* offsets, const uint32_t* expanded, int64_t groups, int64_t rows, float* acc) {
  constexpr int R = kPanelRows * kPanelVectors / NV;
  alignas(64) uint32_t panel[kPanelPairs * NV * kLanes];
  lay_out_panel<NV>(xt, offsets, groups * 2, panel);
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    rows_times_panel<NV, R>(panel, expanded + r * kPanelStride, groups * 2, acc + r * NV * kLanes);
  for (; r < rows; ++r)
    rows_times_panel<NV, 1>(panel, expanded + r * kPanelStride, groups * 2, acc + r * NV * kLanes);
}

// As block_times_tokens. The rows of a panel are expanded once for all tokens, which then pass over them 32 at a time.
inline void block_times_tokens_in_pairs(
    const uint16_t* xt, const int32_t* offsets, const at::BFloat16* values, int64_t ldv, const uint8_t* metadata,
    int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* acc, float* tile, int64_t ldt) {
  constexpr int64_t kTokens = kPanelVectors * kLanes;
  alignas(64) uint32_t expanded[kMostRows * kPanelStride];
  std::fill(acc, acc + rows * ((tokens + kLanes - 1) / kLanes * kLanes), 0.f);
  for (int64_t group = 0; group < groups; group += kPanelGroups) {
    const int64_t count = std::min(kPanelGroups, groups - group);
    for (int64_t r = 0; r < rows; ++r) {
      const at::BFloat16* row = values + r * ldv + group * 2;
      const uint8_t* codes = metadata + r * ldm + group / 2;
      prefetch_panel(row, codes);
      expand_row(row, codes, count, expanded + r * kPanelStride);
    }
    for (int64_t t = 0; t < tokens; t += kTokens) {
      const auto multiply = tokens - t > kLanes ? block_times_panel<2> : block_times_panel<1>;
      multiply(xt + t, offsets + group * 4, expanded, count, rows, acc + rows * t);
    }
  }
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const int64_t left = std::min(kTokens, tokens - t);
    transpose_tile(acc + rows * t, left > kLanes ? kTokens : kLanes, rows, left, tile + t * ldt, ldt);
  }
}

#endif

}  // namespace vnm
