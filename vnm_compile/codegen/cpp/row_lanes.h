// rows_times_tables: rows in the vector lanes.
//
// The rows of a block keep the same 4 columns of a group, each row N of them. So what a token has in these columns is one
// small table for all rows, and a permute looks up what each row multiplies:
//
//     weights    | v of row 0 | v of row 1 | ...       16 rows, one value of each, transposed as they are read
//     lookup     | i of row 0 | i of row 1 | ...       where in the table, from 2 bits of metadata
//     table      | k0 k1 k2 k3 | l0 l1 l2 l3 | ...     of one token and 4 groups
//     sum        += weights * permute(table, lookup)
//
// In bf16 with N = 2 a lane holds both values of a group, the table is that of one group, broadcast, a shuffle of bytes
// looks up the pair, and vdpbf16ps adds two products.
//
// Where activations are bytes a lane holds four values, a shuffle looks up all of them, and vpdpbusd adds four products. Its
// activations are 128 too large: the sums start with what that makes too much.
//
// Nothing is multiplied by zero, no lanes are left to add up, and x needs no transpose.
#pragma once
#include "kept.h"
#include "rounded.h"
#include "rows.h"
#include "sparse_rows.h"

namespace vnm {

// Tokens in a tile, at most: they share one laying out of the rows.
constexpr int64_t kRowLanesTokens = 256;

// tile [tokens][ldt] = x @ rows.T for `rows` rows of one block; x [tokens][ldx]. Defined where kRowLanes may be true.
template <typename S, int N, typename C, typename W>
void block_times_tables(
    const S* x, int64_t ldx, const C* columns, int64_t m, int64_t in_features, const W& weight, const uint8_t* metadata,
    int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* tile, int64_t ldt);

#if defined(CPU_CAPABILITY_AVX512)

// Rows of a vector, and vectors of a tile.
constexpr int64_t kLaneRows = 16, kLaneVectors = kMostRows / kLaneRows;

// What 16 rows multiply at once: a value of each, a pair, or four.
struct alignas(64) LaneStep {
  uint32_t weights[kLaneRows], lookup[kLaneRows];
};

// Steps that are laid out at a time, at most: 16 KB, which leave some of an L1 of 48 KB.
constexpr int64_t kMostSteps = 32;
using LanePanel = LaneStep[kMostSteps][kLaneVectors];

// Values and bits of metadata of a step, and steps and groups of a panel, whose metadata a register of 16 bytes holds.
template <typename S, int N>
constexpr int64_t kStepValues = kQuads<S> ? 4 : kPairs<S, N> ? 2 : 1;
template <typename S, int N>
constexpr int64_t kStepBits = 2 * kStepValues<S, N>;
template <typename S, int N>
constexpr int64_t kPanelSteps = std::min<int64_t>(kMostSteps, 128 / kStepBits<S, N>);
template <typename S, int N>
constexpr int64_t kPanelGroups = kPanelSteps<S, N> * kStepValues<S, N> / N;
// Steps of a panel of which no value has another scale than the others of its row.
template <typename S, int N, typename W>
constexpr int64_t kScaleSteps =
    W::kGroup == kNone ? kPanelSteps<S, N> : std::min(kPanelSteps<S, N>, W::kGroup / kStepValues<S, N>);

// What a table holds, how many tokens are looked up at a time, and from one's tables to the next's.
template <typename S, int N>
using Kept = std::conditional_t<kQuads<S>, uint8_t, std::conditional_t<kPairs<S, N>, uint16_t, float>>;
constexpr int64_t kTableTokens = 8;
template <typename S, int N>
constexpr int64_t kTableStride = kPanelGroups<S, N> * 4 + 64 / static_cast<int64_t>(sizeof(Kept<S, N>));

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

// The lookup of step `step`, whose codes are the lowest bits of each lane.
template <typename S, int N>
inline __m512i lookup_of_codes(__m512i codes, int64_t step) {
  if constexpr (kQuads<S>) {
    // A byte for each of four indices, in the kept bytes of the groups of a step.
    const __m512i shifts = _mm512_set1_epi64(0x2624'2220'0604'0200);
    const __m512i groups = _mm512_set1_epi32(N == 2 ? 0x04040000 : 0x0C080400);
    const __m512i spread = _mm512_multishift_epi64_epi8(shifts, codes);
    return _mm512_ternarylogic_epi32(spread, _mm512_set1_epi8(3), groups, 0xEA);  // (spread & 3) | groups
  } else if constexpr (kPairs<S, N>) {
    // For each value of the two indices the bytes to take.
    alignas(64) static constexpr uint32_t kBytes[16] = {
        0x01000100, 0x01000302, 0x01000504, 0x01000706, 0x03020100, 0x03020302, 0x03020504, 0x03020706,
        0x05040100, 0x05040302, 0x05040504, 0x05040706, 0x07060100, 0x07060302, 0x07060504, 0x07060706};
    return _mm512_permutexvar_epi32(codes, _mm512_load_si512(kBytes));
  } else {
    const __m512i group = _mm512_set1_epi32(static_cast<int>(step / N % 4 * 4));
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(3), group, 0xEA);  // (codes & 3) | group
  }
}

// The lookups of 16 rows over the steps of a panel, `count` values. Metadata `ahead` bytes further on are fetched, unless that is 0.
template <typename S, int N, bool Full>
inline void lay_out_lookups(LaneRow<Full, uint8_t> row, int64_t count, int64_t ahead, LaneStep (*panel)[kLaneVectors]) {
  constexpr int kBits = kStepBits<S, N>, kWords = kPanelSteps<S, N> * kBits / 32, kWordSteps = 32 / kBits;
  const auto bytes = static_cast<__mmask16>((1u << (count + 3) / 4) - 1);
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
  transpose_quarters(codes[0], codes[1], codes[2], codes[3]);  // now 32 bits of 16 rows in each
#pragma GCC unroll 4
  for (int i = 0; i < kWords; ++i)
#pragma GCC unroll 16
    for (int s = 0; s < kWordSteps; ++s) {
      const __m512i lowest = s == 0 ? codes[i] : _mm512_srli_epi32(codes[i], kBits * s);
      _mm512_store_si512(panel[i * kWordSteps + s][0].lookup, lookup_of_codes<S, N>(lowest, i * kWordSteps + s));
    }
}

// The values of 16 rows over up to 16 steps; past the `count` real ones they are 0. Where they are bytes, `starts` gets what the sums
// of 16 rows start with.
template <typename S, int N, typename W, bool Full>
inline void lay_out_weights(
    LaneRow<Full, typename W::Stored> from, int64_t count, LaneStep (*panel)[kLaneVectors], int32_t* starts) {
  const int64_t loaded = std::min<int64_t>(count, 16 * std::min<int64_t>(2, kStepValues<S, N>));
  const auto real = static_cast<uint32_t>((uint64_t{1} << loaded) - 1);
  __m512i row[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i, from.next()) {
    if constexpr (kQuads<S>)
      row[i] = W::bytes_of(from.at, count);
    else if constexpr (kPairs<S, N>)
      row[i] = W::pairs(from.at, real);
    else
      row[i] = _mm512_castps_si512(W::floats(from.at, static_cast<__mmask16>(real)));
    asm("" : "+v"(row[i]));  // loaded once: the compiler would rather load again at every use
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) transpose_quarters(row[i], row[i + 1], row[i + 2], row[i + 3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) transpose_of_quarters(row[i], row[i + 4], row[i + 8], row[i + 12]);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(panel[i][0].weights, row[i]);
#if defined(VNM_BYTE_QUADS)
  if constexpr (kQuads<S>) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(static_cast<char>(kByteZero)), row[i]);
    _mm512_store_si512(starts, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
  }
#endif
}

// Lay out `rows` rows over the steps of a panel, `count` values from value `value` on; `ahead` and `starts` as above.
template <typename S, int N, typename W>
inline void lay_out_rows(
    const W& weight, int64_t value, int64_t count, const uint8_t* metadata, int64_t ldm, int64_t rows, int64_t ahead,
    LanePanel panel, int32_t* starts) {
  constexpr int64_t kEach = 16 * kStepValues<S, N>;
  const auto vector = [&](auto full, int64_t r) {
    constexpr bool Full = decltype(full)::value;
    auto* to = reinterpret_cast<LaneStep(*)[kLaneVectors]>(&panel[0][r / kLaneRows]);
    lay_out_lookups<S, N, Full>({metadata + r * ldm, ldm, rows - r}, count, ahead, to);
    for (int64_t i = 0; i < count; i += kEach, to += 16)
      lay_out_weights<S, N, W, Full>({weight.at(r, value + i), weight.ld, rows - r}, count - i, to, starts + r);
  };
  int64_t r = 0;
  for (; r + kLaneRows <= rows; r += kLaneRows) vector(std::true_type(), r);
  if (r < rows) vector(std::false_type(), r);
}

// What to fetch from memory meanwhile: `count` cache lines, one with every step. They are numbered row by row, kFetchLines in
// each, and the first is number `first`. Row by row, since single lines from many rows come slower; and not more of a row,
// since what is fetched, what is still needed and x share the L2.
constexpr int64_t kFetchLines = 8;
struct Fetch {
  const char* from;
  int64_t distance, first, count;  // distance of rows in bytes
  void line(int64_t step) const {
    const int64_t i = first + step;
    if (step < count) __builtin_prefetch(from + i / kFetchLines * distance + i % kFetchLines * 64);
  }
};

// tile [T][ldt] of V vectors of rows, from `tables` [T][kTableStride], times the rows' `scales` where there are any; sums
// of bytes begin with `starts`. With `more`, add to it. Only the first `tokens` are real, and of the last vector the lanes `last`. Not inlined, where the
// compiler would keep copies on the stack.
template <typename S, int N, int T, int V, bool Scaled>
__attribute__((noinline)) void rows_times_tables(
    const Kept<S, N>* tables, const LaneStep (*panel)[kLaneVectors], const float* scales, const int32_t* starts,
    int64_t steps, bool more, __mmask16 last, int64_t tokens, float* tile, int64_t ldt, Fetch fetch) {
  std::conditional_t<kQuads<S>, __m512i, __m512> sum[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (kQuads<S>)
        sum[t][v] = _mm512_load_si512(starts + v * kLaneRows);
      else
        sum[t][v] = _mm512_setzero_ps();
    }
  for (int64_t s = 0; s < steps; ++s) {
    __m512i weights[V], lookup[V];
    fetch.line(s);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      weights[v] = _mm512_load_si512(panel[s][v].weights);
      lookup[v] = _mm512_load_si512(panel[s][v].lookup);
      asm("" : "+v"(weights[v]), "+v"(lookup[v]));  // pinned, as the rows above
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      __m512i table;
      if constexpr (kQuads<S> && N == 1) {
        const auto* kept = reinterpret_cast<const __m128i*>(tables + t * kTableStride<S, N> + s * 16);
        table = _mm512_broadcast_i32x4(_mm_loadu_si128(kept));
      } else if constexpr (kQuads<S> || kPairs<S, N>) {
        int64_t kept;
        std::memcpy(&kept, tables + t * kTableStride<S, N> + s * (8 / sizeof(Kept<S, N>)), 8);
        table = _mm512_set1_epi64(kept);
      } else {
        table = _mm512_load_si512(tables + t * kTableStride<S, N> + s / (4 * N) * 16);
      }
      if constexpr (V > 1) asm("" : "+v"(table));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if constexpr (kQuads<S>) {
#if defined(VNM_BYTE_QUADS)
          sum[t][v] = _mm512_dpbusd_epi32(sum[t][v], _mm512_shuffle_epi8(table, lookup[v]), weights[v]);
#endif
        } else if constexpr (kPairs<S, N>) {
          const __m512i kept = _mm512_shuffle_epi8(table, lookup[v]);
          sum[t][v] = _mm512_dpbf16_ps(sum[t][v], (__m512bh)weights[v], (__m512bh)kept);
        } else {
          const __m512 kept = _mm512_castsi512_ps(_mm512_permutexvar_epi32(lookup[v], table));
          sum[t][v] = _mm512_fmadd_ps(_mm512_castsi512_ps(weights[v]), kept, sum[t][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    if (t >= tokens) break;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __mmask16 lanes = v == V - 1 ? last : 0xFFFF;
      float* to = tile + t * ldt + v * kLaneRows;
      __m512 total;
      if constexpr (kQuads<S>)
        total = _mm512_cvtepi32_ps(sum[t][v]);
      else
        total = sum[t][v];
      if constexpr (Scaled) total = _mm512_mul_ps(total, _mm512_load_ps(scales + v * kLaneRows));
      _mm512_mask_storeu_ps(to, lanes, more ? _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), total) : total);
    }
  }
}

// The scales of value `value` of `rows` rows.
template <typename W>
inline void lay_out_scales(const W& weight, int64_t value, int64_t rows, float* scales) {
  if constexpr (W::kGroup != kNone)
    for (int64_t r = 0; r < rows; ++r) scales[r] = static_cast<float>(*weight.scale_at(r, value));
}

template <typename S, int N, typename C, typename W>
void block_times_tables(
    const S* x, int64_t ldx, const C* columns, int64_t m, int64_t in_features, const W& weight, const uint8_t* metadata,
    int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* tile, int64_t ldt) {
  constexpr int64_t kValues = kStepValues<S, N>, kStride = kTableStride<S, N>, kSteps = kScaleSteps<S, N, W>;
  // What comes is fetched a few panels at a time: as many bytes of a row as kFetchLines hold.
  constexpr int64_t kPanel = kSteps * kValues;
  constexpr int64_t kFetchValues = std::max(kPanel, kFetchLines * 64 * 4 / W::bytes(4) / kPanel * kPanel);
  constexpr int64_t kFetchPanels = kFetchValues / kPanel;
  LanePanel panel;
  alignas(64) float scales[kMostRows] = {};
  alignas(64) int32_t starts[kMostRows];
  alignas(64) Kept<S, N> tables[kTableTokens * kStride] = {};
  const int64_t vectors = (rows + kLaneRows - 1) / kLaneRows, total = groups * N;
  const auto tail = static_cast<__mmask16>(0xFFFF >> (vectors * kLaneRows - rows));
  const int64_t sum = std::is_same_v<S, float> ? std::min(kSteps, longest_sum(in_features, N, m)) : kSteps;  // in steps
  const int64_t calls =
      (tokens + kTableTokens - 1) / kTableTokens * ((vectors + 1) / 2) * ((kSteps + sum - 1) / sum) * kFetchPanels;
  const auto distance = weight.ld * static_cast<int64_t>(sizeof(typename W::Stored));
  Fetch fetch{nullptr, distance, 0, (rows * kFetchLines + calls - 1) / calls};
  for (int64_t value = 0; value < total; value += kPanel) {
    const int64_t count = std::min(kPanel, total - value), steps = (count + kValues - 1) / kValues;
    const int64_t g = value / N, kept = count / N;
    // A few panels at a time the next few are fetched, or the first ones of the next rows.
    const bool fetches = value % kFetchValues == 0, last = value + kFetchValues >= total;
    if (fetches) {
      fetch.from = reinterpret_cast<const char*>(last ? weight.at(rows, 0) : weight.at(0, value + kFetchValues));
      fetch.first = 0;
    }
    const int64_t ahead = !fetches ? 0 : last ? rows * ldm - value / 4 : kFetchValues / 4;
    lay_out_rows<S, N>(weight, value, count, metadata + value / 4, ldm, rows, ahead, panel, starts);
    lay_out_scales(weight, value, rows, scales);
    for (int64_t t = 0; t < tokens; t += kTableTokens) {
      const int64_t real = std::min(kTableTokens, tokens - t);
      gather_kept(x + t * ldx + g * m, ldx, real, columns + g * 4, kept, m, in_features - g * m, tables, kStride);
      const auto multiply = [&](auto together, auto side, int64_t v) {
        constexpr int T = decltype(together)::value, V = decltype(side)::value;
        for (int64_t s = 0; s < steps; s += sum) {
          rows_times_tables<S, N, T, V, W::kGroup != kNone>(
              tables + s * kValues / N * 4, reinterpret_cast<const LaneStep(*)[kLaneVectors]>(&panel[s][v]),
              scales + v * kLaneRows, starts + v * kLaneRows, std::min(sum, steps - s), value + s > 0,
              v + V == vectors ? tail : 0xFFFF, real, tile + t * ldt + v * kLaneRows, ldt, fetch);
          fetch.first += fetch.count;
        }
      };
      int64_t v = 0;
      for (; v + 2 <= vectors; v += 2) real > 4 ? multiply(Is<8>(), Is<2>(), v) : multiply(Is<4>(), Is<2>(), v);
      if (v < vectors) multiply(Is<8>(), Is<1>(), v);
    }
  }
}

#endif

}  // namespace vnm
