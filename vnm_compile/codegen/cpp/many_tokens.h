// rows_times_tokens: tokens in the vector lanes.
#pragma once
#include "sparse_rows.h"

namespace vnm {

// Where the 4 kept columns of each group start in xt; columns past the last one point at a row of zeros.
template <typename C>
inline void column_offsets(
    const C* columns, int64_t groups, int64_t m, int64_t in_features, int64_t ld, int32_t* offsets) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < 4; ++c) {
      offsets[g * 4 + c] = static_cast<int32_t>(std::min<int64_t>(g * m + columns[g * 4 + c], in_features) * ld);
    }
  }
}

// One step of a row, unpacked: values in float, and where in xt each finds its column. Both are padded to a whole step
// with zeros and `zero_row`.
template <typename S, int N>
inline void unpack_step(
    const S* values, const uint8_t* metadata, const int32_t* offsets, int64_t count, int32_t zero_row, float* weights,
    int32_t* rows) {
#if defined(CPU_CAPABILITY_AVX512)
  if (count == kStep) {
    uint32_t codes;
    std::memcpy(&codes, metadata, 4);
    const __m512i index = step_index<N>(codes);
    __m512i picked = _mm512_permutex2var_epi32(_mm512_loadu_si512(offsets), index, _mm512_loadu_si512(offsets + 16));
    if constexpr (N == 1) {
      const __m512i upper =
          _mm512_permutex2var_epi32(_mm512_loadu_si512(offsets + 32), index, _mm512_loadu_si512(offsets + 48));
      picked = _mm512_mask_mov_epi32(picked, 0xFF00, upper);
    }
    _mm512_storeu_si512(rows, picked);
    _mm512_storeu_ps(weights, load_values(values, 0xFFFF));
    return;
  }
#endif
  for (int64_t i = 0; i < kStep; ++i) {
    const bool real = i < count;
    const int64_t code = real ? (metadata[i / 4] >> (2 * (i % 4))) & 3 : 0;
    weights[i] = real ? static_cast<float>(values[i]) : 0.f;
    rows[i] = real ? offsets[(i / N) * 4 + code] : zero_row;
  }
}

// acc [R][ld] += one step of R rows, for NV vectors of tokens; weights and rows [R][kStep].
template <int NV, int R>
inline void rows_times_tokens(const float* xt, const float* weights, const int32_t* rows, float* acc, int64_t ld) {
  Vec sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = Vec(0.f);
#pragma GCC unroll 4
  for (int i = 0; i < kStep; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float* row = xt + rows[r * kStep + i];
      const Vec w(weights[r * kStep + i]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[r][v] = at::vec::fmadd(w, Vec::loadu(row + v * kLanes), sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* to = acc + r * ld + v * kLanes;
      (Vec::loadu(to) + sum[r][v]).store(to);
    }
}

#if defined(VNM_BF16_PAIRS)

// bf16 with two values a group: both go into one dot product, vdpbf16ps, with the pair of columns that they stand in.
// Of the 4 kept columns there are 6 pairs; each is laid out once a block and then serves all rows:
//
//     pairs [group][6][tokens] of (x of the first column, x of the second), 32 bits together
//     the two values of a row and group, 32 bits as they are stored, broadcast   ->   acc [rows][tokens]
constexpr int64_t kPairGroups = 8;

// The pairs of columns of up to 8 groups.
template <int NV>
inline void lay_out_pairs(const uint16_t* xt, const int32_t* offsets, int64_t groups, uint32_t* pairs, int64_t ld) {
  constexpr int kFirst[6] = {0, 0, 0, 1, 1, 2}, kSecond[6] = {1, 2, 3, 2, 3, 3};
  // Words of the lower and of the upper half of 32 tokens, those of two columns in turn.
  alignas(64) static constexpr uint16_t kLower[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i lower = _mm512_load_si512(kLower), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v += 2) {
      __m512i x[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const uint16_t* from = xt + offsets[g * 4 + c] + v * kLanes;
        x[c] = v + 1 < NV ? _mm512_loadu_si512(from)
                          : _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      }
#pragma GCC unroll 6
      for (int p = 0; p < 6; ++p) {
        uint32_t* to = pairs + (g * 6 + p) * ld + v * kLanes;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x[kFirst[p]], lower, x[kSecond[p]]));
        if (v + 1 < NV)
          _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(x[kFirst[p]], upper, x[kSecond[p]]));
      }
    }
  }
}

// One step of 8 groups of a row, unpacked: the two values of each group, and where their pair of columns is laid out.
template <int64_t ld>
inline void unpack_pairs(
    const at::BFloat16* values, const uint8_t* metadata, int64_t groups, uint32_t* weights, int32_t* places) {
  // Which of the 6 pairs two increasing indices make: first | second << 2.
  const __m256i low = _mm256_setzero_si256(), high = _mm256_setr_epi32(ld, 3 * ld, 0, 0, 2 * ld, 4 * ld, 5 * ld, 0);
  const __m256i group = _mm256_setr_epi32(0, 6 * ld, 12 * ld, 18 * ld, 24 * ld, 30 * ld, 36 * ld, 42 * ld);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  uint32_t codes = 0;
  if (groups == kPairGroups) {
    std::memcpy(&codes, metadata, 4);  // a size that is not known would be a call
  } else {
    std::memcpy(&codes, metadata, (groups + 1) / 2);
  }
  const __m256i nibble = _mm256_and_si256(
      _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(codes)), shifts), _mm256_set1_epi32(15));
  const __m256i place = _mm256_add_epi32(group, _mm256_permutex2var_epi32(low, nibble, high));
  const __mmask8 real = static_cast<__mmask8>((1u << groups) - 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights), _mm256_maskz_loadu_epi32(real, values));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(places), _mm256_maskz_mov_epi32(real, place));
}

template <int NV, int R>
inline void pairs_times_tokens(
    const uint32_t* pairs, const uint32_t* weights, const int32_t* places, float* acc, int64_t ld) {
  __m512 sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < kPairGroups; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint32_t* row = pairs + places[r * kPairGroups + i];
      const __m512bh w = (__m512bh)_mm512_set1_epi32(static_cast<int>(weights[r * kPairGroups + i]));
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)_mm512_loadu_si512(row + v * kLanes), w);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* to = acc + r * ld + v * kLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]));
    }
}

// As block_times_tokens, for bf16 and N = 2.
template <int NV>
inline void block_times_tokens_in_pairs(
    const uint16_t* xt, const int32_t* offsets, const at::BFloat16* values, int64_t ldv, const uint8_t* metadata,
    int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* acc, int64_t ld, float* tile, int64_t ldt) {
  constexpr int R = NV <= 2 ? 8 : 4;
  alignas(64) uint32_t pairs[kPairGroups * 6 * NV * kLanes];
  alignas(64) uint32_t weights[kMostRows * kPairGroups];
  alignas(64) int32_t places[kMostRows * kPairGroups];
  std::fill(acc, acc + rows * ld, 0.f);
  for (int64_t group = 0; group < groups; group += kPairGroups) {
    const int64_t count = std::min(kPairGroups, groups - group);
    lay_out_pairs<NV>(xt, offsets + group * 4, count, pairs, NV * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      prefetch_values(values + r * ldv, (group + 2 * kPairGroups) * 2);
      unpack_pairs<NV * kLanes>(
          values + r * ldv + group * 2, metadata + r * ldm + group / 2, count, weights + r * kPairGroups,
          places + r * kPairGroups);
    }
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      pairs_times_tokens<NV, R>(pairs, weights + r * kPairGroups, places + r * kPairGroups, acc + r * ld, ld);
    for (; r < rows; ++r)
      pairs_times_tokens<NV, 1>(pairs, weights + r * kPairGroups, places + r * kPairGroups, acc + r * ld, ld);
  }
  transpose_tile(acc, ld, rows, tokens, tile, ldt);
}

#endif

// As block_times_tokens, a value at a time.
template <typename S, int N, int NV>
inline void block_times_tokens_by_values(
    const float* xt, const int32_t* offsets, int32_t zero_row, const S* values, int64_t ldv, const uint8_t* metadata,
    int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* acc, int64_t ld, float* tile, int64_t ldt) {
  // Sums of sums of sums, so that they round no worse than those of a dense kernel, which also adds up in blocks: in
  // registers over a step, in `part` over kPart of them, then in `acc`. A step keeps so few rows of tokens that these stay
  // in the L1 cache while all rows of the weight pass over them.
  constexpr int64_t kPart = 8;
  // Rows at a time: enough independent sums to hide the latency of an FMA, and not more than there are registers.
  constexpr int R = NV == 1 ? 8 : NV == 2 ? 4 : 2;
  alignas(64) float weights[kMostRows * kStep];
  alignas(64) int32_t places[kMostRows * kStep];
  const int64_t count = groups * N, steps = (count + kStep - 1) / kStep;
  float* part = acc + rows * ld;
  std::fill(acc, acc + rows * ld, 0.f);
  for (int64_t first = 0; first < steps; first += kPart) {
    const int64_t stop = std::min(steps, first + kPart);
    float* to = first == 0 ? acc : part;
    if (first > 0) std::fill(part, part + rows * ld, 0.f);
    for (int64_t step = first; step < stop; ++step) {
      const int64_t value = step * kStep;
      for (int64_t r = 0; r < rows; ++r) {
        prefetch_values(values + r * ldv, value + 2 * kStep);
        unpack_step<S, N>(
            values + r * ldv + value, metadata + r * ldm + value / 4, offsets + value / N * 4,
            std::min(kStep, count - value), zero_row, weights + r * kStep, places + r * kStep);
      }
      int64_t r = 0;
      for (; r + R <= rows; r += R)
        rows_times_tokens<NV, R>(xt, weights + r * kStep, places + r * kStep, to + r * ld, ld);
      for (; r < rows; ++r)
        rows_times_tokens<NV, 1>(xt, weights + r * kStep, places + r * kStep, to + r * ld, ld);
    }
    if (first > 0)
      for (int64_t i = 0; i < rows * ld; i += kLanes) (Vec::loadu(acc + i) + Vec::loadu(part + i)).store(acc + i);
  }
  transpose_tile(acc, ld, rows, tokens, tile, ldt);
}

// tile [tokens][ldt] = x @ rows.T for up to kMostRows rows of one block; acc [2][rows][ld] is scratch.
template <typename S, int N, int NV>
inline void block_times_tokens(
    const Lane<S, N>* xt, const int32_t* offsets, int32_t zero_row, const S* values, int64_t ldv, const uint8_t* metadata,
    int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* acc, int64_t ld, float* tile, int64_t ldt) {
  if constexpr (kPairs<S, N>) {
#if defined(VNM_BF16_PAIRS)
    block_times_tokens_in_pairs<NV>(
        xt, offsets, values, ldv, metadata, ldm, groups, rows, tokens, acc, ld, tile, ldt);
#endif
  } else {
    block_times_tokens_by_values<S, N, NV>(
        xt, offsets, zero_row, values, ldv, metadata, ldm, groups, rows, tokens, acc, ld, tile, ldt);
  }
}

}  // namespace vnm
