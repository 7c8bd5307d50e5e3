// rows_times_tables: rows in the vector lanes, for bf16, N = 2 and blocks that have rows enough to fill vectors.
//
// The rows of a block keep the same 4 columns of a group, each row 2 of them. So what a token has in these columns is one
// small table for all rows, and a shuffle of bytes looks up every row's own pair in it:
//
//     weights    | v0 v1 of row 0 | v0 v1 of row 1 | ...    16 rows of a group, transposed as they are read
//     lookup     | i0 i1 of row 0 | i0 i1 of row 1 | ...    the bytes to take, from 4 bits of metadata a row
//     table      | k0 k1 k2 k3 | k0 k1 k2 k3 | ...          of one token, broadcast
//     sum        += weights * shuffle(table, lookup)        one vdpbf16ps
//
// Nothing is multiplied by zero, no lanes are left to add up, and x needs no transpose.
#pragma once
#include "few_tokens_bf16.h"
#include "sparse_rows.h"

namespace vnm {

// Tokens in a tile, at most: they share one laying out of the rows.
constexpr int64_t kRowLanesTokens = 256;

// tile [tokens][ldt] = x @ rows.T for `rows` rows of one block; x [tokens][ldx]. Defined where kRowLanes may be true.
template <typename S, typename C>
void block_times_tables(
    const S* x, int64_t ldx, const C* columns, int64_t m, int64_t in_features, const S* values, int64_t ldv,
    const uint8_t* metadata, int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* tile, int64_t ldt);

#if defined(VNM_BF16_PAIRS)

// Groups that are laid out at a time: 128 bits of metadata, and 16 KB laid out, which leave some of an L1 of 48 KB.
constexpr int64_t kPanelGroups = 32;
// Rows of a vector, and vectors of a tile.
constexpr int64_t kLaneRows = 16, kLaneVectors = kMostRows / kLaneRows;
// Tokens that are looked up at a time, and words from one's tables to the next's.
constexpr int64_t kTableTokens = 8, kTableWords = kPanelGroups * 4 + 32;

// 16 rows of a group.
struct alignas(64) LaneGroup {
  uint32_t weights[kLaneRows], lookup[kLaneRows];
};
// The rows of a tile over a panel.
using LanePanel = LaneGroup[kPanelGroups][kLaneVectors];

// In each quarter of four vectors a 4 x 4 transpose.
inline void transpose_quarters(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
  const __m512i ab = _mm512_unpacklo_epi32(a, b), ab2 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd = _mm512_unpacklo_epi32(c, d), cd2 = _mm512_unpackhi_epi32(c, d);
  a = _mm512_unpacklo_epi64(ab, cd);
  b = _mm512_unpackhi_epi64(ab, cd);
  c = _mm512_unpacklo_epi64(ab2, cd2);
  d = _mm512_unpackhi_epi64(ab2, cd2);
}

// A 4 x 4 transpose of the quarters of four vectors.
inline void transpose_of_quarters(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
  const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x88), ab2 = _mm512_shuffle_i32x4(a, b, 0xDD);
  const __m512i cd = _mm512_shuffle_i32x4(c, d, 0x88), cd2 = _mm512_shuffle_i32x4(c, d, 0xDD);
  a = _mm512_shuffle_i32x4(ab, cd, 0x88);
  b = _mm512_shuffle_i32x4(ab2, cd2, 0x88);
  c = _mm512_shuffle_i32x4(ab, cd, 0xDD);
  d = _mm512_shuffle_i32x4(ab2, cd2, 0xDD);
}

// For each value of 4 bits of metadata, which hold the two indices of a group, the bytes to take from a table.
inline __m512i lookup_of_codes() {
  alignas(64) static constexpr uint32_t kLookup[16] = {
      0x01000100, 0x01000302, 0x01000504, 0x01000706, 0x03020100, 0x03020302, 0x03020504, 0x03020706,
      0x05040100, 0x05040302, 0x05040504, 0x05040706, 0x07060100, 0x07060302, 0x07060504, 0x07060706};
  return _mm512_load_si512(kLookup);
}

// The rows of an array one after the other. The compiler would rather keep 16 pointers, for which it has no registers.
template <bool Full, typename P>
struct LaneRow {
  const P* at;
  int64_t distance, left;  // lanes past the last row repeat it
  void next() {
    if (Full || --left > 0) at += distance;
    asm("" : "+r"(at));
  }
};

// The lookups of 16 rows over up to kPanelGroups groups. Metadata `ahead` bytes further on are fetched, unless that is 0.
template <bool Full>
inline void lay_out_lookups(LaneRow<Full, uint8_t> row, int64_t groups, int64_t ahead, LaneGroup (*panel)[kLaneVectors]) {
  const auto bytes = static_cast<__mmask16>((1u << ((groups + 1) / 2)) - 1);
  const __m512i table = lookup_of_codes();
  __m512i codes[4];  // row 4 * q + i in quarter q of codes[i]
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, row.next()) {
      const __m128i bits = _mm_maskz_loadu_epi8(bytes, row.at);
      if (ahead > 0) __builtin_prefetch(row.at + ahead);
      codes[i] = q == 0 ? _mm512_castsi128_si512(bits)
                        : _mm512_mask_broadcast_i32x4(codes[i], static_cast<__mmask16>(15 << (4 * q)), bits);
    }
  transpose_quarters(codes[0], codes[1], codes[2], codes[3]);  // now 8 groups of 16 rows in each
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g)
      _mm512_store_si512(
          panel[i * 8 + g][0].lookup,
          _mm512_permutexvar_epi32(g == 0 ? codes[i] : _mm512_srli_epi32(codes[i], 4 * g), table));
}

// The values of 16 rows over up to 16 groups; past the last one they are 0.
template <bool Full>
inline void lay_out_weights(LaneRow<Full, at::BFloat16> from, int64_t groups, LaneGroup (*panel)[kLaneVectors]) {
  const auto real = static_cast<__mmask16>((1u << std::min<int64_t>(16, groups)) - 1);
  __m512i row[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i, from.next()) {
    row[i] = _mm512_maskz_loadu_epi32(real, from.at);
    asm("" : "+v"(row[i]));  // loaded once: the compiler would rather load again at every use
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) transpose_quarters(row[i], row[i + 1], row[i + 2], row[i + 3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) transpose_of_quarters(row[i], row[i + 4], row[i + 8], row[i + 12]);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(panel[i][0].weights, row[i]);
}

// Lay out `rows` rows over up to kPanelGroups groups; `ahead` as above.
inline void lay_out_rows(
    const at::BFloat16* values, int64_t ldv, const uint8_t* metadata, int64_t ldm, int64_t groups, int64_t rows,
    int64_t ahead, LanePanel panel) {
  const auto vector = [&](auto full, int64_t r) {
    constexpr bool Full = decltype(full)::value;
    auto* to = reinterpret_cast<LaneGroup(*)[kLaneVectors]>(&panel[0][r / kLaneRows]);
    lay_out_lookups<Full>({metadata + r * ldm, ldm, rows - r}, groups, ahead, to);
    for (int64_t g = 0; g < groups; g += 16)
      lay_out_weights<Full>({values + r * ldv + 2 * g, ldv, rows - r}, groups - g, to + g);
  };
  int64_t r = 0;
  for (; r + kLaneRows <= rows; r += kLaneRows) vector(std::true_type(), r);
  if (r < rows) vector(std::false_type(), r);
}

// What to fetch from memory meanwhile: `step` bytes with every group.
struct Fetch {
  const char* from;
  int64_t step;
};

// tile [T][ldt] of V vectors of rows, from `tables` [T][kTableWords]; with `more`, add to it. Only the first `tokens` are
// real, and of the last vector the lanes `last`. Not inlined, where the compiler would keep copies on the stack.
template <int T, int V>
__attribute__((noinline)) void rows_times_tables(
    const uint16_t* tables, const LaneGroup (*panel)[kLaneVectors], int64_t groups, bool more, __mmask16 last,
    int64_t tokens, float* tile, int64_t ldt, Fetch fetch) {
  __m512 sum[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[t][v] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i weights[V], lookup[V];
    for (int64_t b = 0; b < fetch.step; b += 64) __builtin_prefetch(fetch.from + g * fetch.step + b);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      weights[v] = _mm512_load_si512(panel[g][v].weights);
      lookup[v] = _mm512_load_si512(panel[g][v].lookup);
      asm("" : "+v"(weights[v]), "+v"(lookup[v]));  // pinned, as the rows above
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      int64_t kept;
      std::memcpy(&kept, tables + t * kTableWords + g * 4, 8);
      __m512i table = _mm512_set1_epi64(kept);
      if constexpr (V > 1) asm("" : "+v"(table));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[t][v] = _mm512_dpbf16_ps(
            sum[t][v], (__m512bh)weights[v], (__m512bh)_mm512_shuffle_epi8(table, lookup[v]));
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    if (t >= tokens) break;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __mmask16 lanes = v == V - 1 ? last : 0xFFFF;
      float* to = tile + t * ldt + v * kLaneRows;
      _mm512_mask_storeu_ps(to, lanes, more ? _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum[t][v]) : sum[t][v]);
    }
  }
}

template <typename S, typename C>
void block_times_tables(
    const S* x, int64_t ldx, const C* columns, int64_t m, int64_t in_features, const S* values, int64_t ldv,
    const uint8_t* metadata, int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* tile, int64_t ldt) {
  LanePanel panel;
  alignas(64) uint16_t tables[kTableTokens * kTableWords] = {};
  const int64_t vectors = (rows + kLaneRows - 1) / kLaneRows;
  const auto tail = static_cast<__mmask16>(0xFFFF >> (vectors * kLaneRows - rows));
  // The rows that come next lie one after the other, and are fetched in this order: panel by panel would be slower.
  const int64_t steps = (tokens + kTableTokens - 1) / kTableTokens * ((vectors + 1) / 2) * groups;
  Fetch fetch{reinterpret_cast<const char*>(values + rows * ldv), rows * ldv * 2 / steps};
  for (int64_t g = 0; g < groups; g += kPanelGroups) {
    const int64_t count = std::min(kPanelGroups, groups - g);
    // A cache line of metadata is 128 groups.
    lay_out_rows(values + g * 2, ldv, metadata + g / 2, ldm, count, rows, g % 128 == 0 ? rows * ldm : 0, panel);
    for (int64_t t = 0; t < tokens; t += kTableTokens) {
      const int64_t real = std::min(kTableTokens, tokens - t);
      gather_words(x + t * ldx + g * m, ldx, real, columns + g * 4, count, m, in_features - g * m, tables, kTableWords);
      const auto multiply = [&](auto together, auto side, int64_t v) {
        constexpr int T = decltype(together)::value, V = decltype(side)::value;
        rows_times_tables<T, V>(
            tables, reinterpret_cast<const LaneGroup(*)[kLaneVectors]>(&panel[0][v]), count, g > 0,
            v + V == vectors ? tail : 0xFFFF, real, tile + t * ldt + v * kLaneRows, ldt, fetch);
        fetch.from += count * fetch.step;
      };
      int64_t v = 0;
      for (; v + 2 <= vectors; v += 2) real > 4 ? multiply(Is<8>(), Is<2>(), v) : multiply(Is<4>(), Is<2>(), v);
      if (v < vectors) multiply(Is<8>(), Is<1>(), v);
    }
  }
}

#endif

}  // namespace vnm
