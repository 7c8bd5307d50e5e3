// Sparse rows times dense tokens: the arithmetic of V:N:M on a CPU.
//
// Two kernels, both over rows of one V block, both reading every compressed byte once and in order:
//
//   rows_times_tokens     tokens in the vector lanes. x is transposed once, so that a column of the weight is a row of
//                         tokens; a value is broadcast, its 2-bit index picks one of the block's 4 column addresses, and
//                         one FMA a vector of tokens does only the N/M of the work that is not zero:
//
//        xt   [in_features][tokens]         acc [rows][tokens]
//        column g*M+c0  | | | | | | | |
//        column g*M+c1  |#|#|#|#|#|#|#|  x value ->  += row r
//        column g*M+c2  | | | | | | | |         (index 1)
//        column g*M+c3  | | | | | | | |
//
//   rows_times_few_tokens  groups in the vector lanes, for up to 12 tokens, where only the weight's bytes count. The kept
//                          activations of 8 groups (N = 2) fill two registers, and a permute by the indices lines them
//                          up with 16 values:
//
//        values    | v0 v1 | v2 v3 | v4 v5 | ...       16 of 8 groups, as stored
//        indices   | i0 i1 | i2 i3 | i4 i5 | ...       32 bits of metadata, spread over the lanes
//        kept      | k0 k1 k2 k3 | k4 k5 k6 k7 | ...   gathered once a block
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

namespace vnm {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Floats at a cache line's start: an unaligned vector load would touch two lines.
inline Buffer aligned_buffer(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  return Buffer(static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
}

inline Vec load_vector(const float* p) { return Vec::loadu(p); }
inline Vec load_vector(const at::BFloat16* p) {
  Vec result;
  at::vec::load_fp32_from_bf16(p, result);
  return result;
}
inline Vec load_vector(const at::Half* p) {
  Vec result;
  at::vec::load_fp32_from_fp16(p, result);
  return result;
}

// x [tokens, columns] (row stride ldx) to xt [columns][ld] in float; lanes past `tokens` up to whole vectors are zero.
template <typename S>
inline void transpose(const S* x, int64_t ldx, int64_t tokens, int64_t columns, float* xt, int64_t ld) {
  alignas(64) float square[kLanes * kLanes];
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const int64_t nt = std::min(kLanes, tokens - t);
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int64_t nk = std::min(kLanes, columns - k);
      const S* from = x + t * ldx + k;
      float* to = xt + k * ld + t;
      if (std::is_same_v<S, float> && nt == kLanes && nk == kLanes) {
        at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from), ldx, to, ld, kLanes, kLanes);
        continue;
      }
      if (nt < kLanes || nk < kLanes) {
        std::fill(square, square + kLanes * kLanes, 0.f);
      }
      if (nk == kLanes) {
        for (int64_t i = 0; i < nt; ++i) load_vector(from + i * ldx).store(square + i * kLanes);
        at::vec::transpose_mxn<float>(square, kLanes, to, ld, kLanes, kLanes);
        continue;
      }
      for (int64_t i = 0; i < nt; ++i)
        for (int64_t j = 0; j < nk; ++j) square[i * kLanes + j] = static_cast<float>(from[i * ldx + j]);
      for (int64_t j = 0; j < nk; ++j)
        for (int64_t i = 0; i < kLanes; ++i) to[j * ld + i] = square[i * kLanes + j];
    }
  }
}

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

#if defined(CPU_CAPABILITY_AVX512)

inline __m512 load_values(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load_values(const at::BFloat16* p, __mmask16 mask) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline __m512 load_values(const at::Half* p, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}

// For each of 16 values the place of its column among the 32 kept ones of its 8 groups; where N is 1 among those of the
// first 8 groups for the lower lanes and of the second 8 for the upper ones.
template <int N>
inline __m512i step_index(uint32_t codes) {
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i first = N == 2 ? _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28)
                               : _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i spread = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(codes)), shifts);
  return _mm512_ternarylogic_epi32(spread, _mm512_set1_epi32(3), first, 0xEA);  // (spread & 3) | first
}

#endif

// A step: 16 values of a row, which is 8 groups where N is 2 and 16 where it is 1, and 4 bytes of metadata.
constexpr int64_t kStep = 16;

// Rows of a tile, at most.
constexpr int64_t kMostRows = 64;

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

// acc [rows][ld], tokens in the columns, to tile [tokens][ldt].
inline void transpose_tile(const float* acc, int64_t ld, int64_t rows, int64_t tokens, float* tile, int64_t ldt) {
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    int64_t t = 0;
    for (; t + kLanes <= tokens; t += kLanes)
      at::vec::transpose_mxn<float>(acc + r * ld + t, ld, tile + t * ldt + r, ldt, kLanes, kLanes);
    for (; t < tokens; ++t)
      for (int64_t i = 0; i < kLanes; ++i) tile[t * ldt + r + i] = acc[(r + i) * ld + t];
  }
  for (; r < rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) tile[t * ldt + r] = acc[r * ld + t];
}

// Fetch values that a row holds further on: the rows of a weight lie so far apart that no hardware prefetcher follows.
template <typename S>
inline void prefetch_values(const S* values, int64_t ahead) {
  __builtin_prefetch(values + ahead);
}

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define VNM_BF16_PAIRS 1

// bf16 with two values a group: both go into one dot product, vdpbf16ps, with the pair of columns that they stand in.
// Of the 4 kept columns there are 6 pairs; each is laid out once a block and then serves all rows:
//
//     pairs [group][6][tokens] of (x of the first column, x of the second), 32 bits together
//     the two values of a row and group, 32 bits as they are stored, broadcast   ->   acc [rows][tokens]
constexpr int64_t kPairGroups = 8;

// The pairs of columns of up to 8 groups; the x of a column is bf16 widened to float, its upper half.
template <int NV>
inline void lay_out_pairs(const float* xt, const int32_t* offsets, int64_t groups, uint32_t* pairs, int64_t ld) {
  constexpr int kFirst[6] = {0, 0, 0, 1, 1, 2}, kSecond[6] = {1, 2, 3, 2, 3, 3};
  for (int64_t g = 0; g < groups; ++g) {
    for (int v = 0; v < NV; ++v) {
      __m512i x[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) x[c] = _mm512_loadu_si512(xt + offsets[g * 4 + c] + v * kLanes);
#pragma GCC unroll 6
      for (int p = 0; p < 6; ++p) {
        const __m512i both = _mm512_or_si512(_mm512_srli_epi32(x[kFirst[p]], 16), x[kSecond[p]]);
        _mm512_storeu_si512(pairs + (g * 6 + p) * ld + v * kLanes, both);
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

// As the general block_times_tokens, for bf16 and N = 2.
template <int NV>
inline void block_times_tokens_in_pairs(
    const float* xt, const int32_t* offsets, const at::BFloat16* values, int64_t ldv, const uint8_t* metadata,
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

// tile [tokens][ldt] = x @ rows.T for up to kMostRows rows of one block; acc [2][rows][ld] is scratch.
template <typename S, int N, int NV>
inline void block_times_tokens(
    const float* xt, const int32_t* offsets, int32_t zero_row, const S* values, int64_t ldv, const uint8_t* metadata,
    int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* acc, int64_t ld, float* tile, int64_t ldt) {
#if defined(VNM_BF16_PAIRS)
  if constexpr (N == 2 && std::is_same_v<S, at::BFloat16>) {
    return block_times_tokens_in_pairs<NV>(
        xt, offsets, values, ldv, metadata, ldm, groups, rows, tokens, acc, ld, tile, ldt);
  }
#endif
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

// Tokens up to which a permute a token and step is cheaper than a broadcast, an address and a load a value.
template <typename S, int N>
constexpr int64_t few_tokens() {
#if defined(VNM_BF16_PAIRS)
  if constexpr (N == 2 && std::is_same_v<S, at::BFloat16>) return 8;
#endif
#if defined(CPU_CAPABILITY_AVX512)
  return 12;
#else
  return 4;
#endif
}

// The 4 kept activations of each group, side by side; 0 for columns past the last one. `kept` [groups * 4].
template <typename S, typename C>
inline void gather_kept(
    const S* x, const C* columns, int64_t groups, int64_t m, int64_t in_features, float* kept) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < 4; ++c) {
      const int64_t column = g * m + columns[g * 4 + c];
      kept[g * 4 + c] = column < in_features ? static_cast<float>(x[column]) : 0.f;
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)

// sums[t][r] of R rows and T tokens. `kept` [T][ldk], zero from groups * 4 up to a multiple of 64.
template <typename S, int N, int T, int R>
inline void rows_times_few_tokens(
    const float* kept, int64_t ldk, const S* values, int64_t ldv, const uint8_t* metadata, int64_t ldm, int64_t groups,
    float* sums, int64_t lds) {
  __m512 sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[r][t] = _mm512_setzero_ps();
  // One step of all rows; `value` counts values from the start of a row, `bytes` those of metadata to read.
  const auto step = [&](int64_t value, size_t bytes, __mmask16 mask) __attribute__((always_inline)) {
    __m512i index[R];
    __m512 weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint32_t codes = 0;
      std::memcpy(&codes, metadata + r * ldm + value / 4, bytes);
      index[r] = step_index<N>(codes);
      weight[r] = load_values(values + r * ldv + value, mask);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const float* table = kept + t * ldk + value / N * 4;
      const __m512 t0 = _mm512_loadu_ps(table), t1 = _mm512_loadu_ps(table + 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __m512 picked = _mm512_permutex2var_ps(t0, index[r], t1);
        if constexpr (N == 1) {
          const __m512 t2 = _mm512_loadu_ps(table + 32), t3 = _mm512_loadu_ps(table + 48);
          picked = _mm512_mask_mov_ps(picked, 0xFF00, _mm512_permutex2var_ps(t2, index[r], t3));
        }
        sum[r][t] = _mm512_fmadd_ps(weight[r], picked, sum[r][t]);
      }
    }
  };
  const int64_t count = groups * N, whole = count / kStep * kStep;
  // Fetch the same place of later rows, about 16 KB on: a row is too short for a hardware prefetcher to get going, and the
  // next few rows, where they are short, would be needed before they arrive.
  const int64_t ahead = R * std::max<int64_t>(1, 16384 / (R * ldv * static_cast<int64_t>(sizeof(S))));
  for (int64_t value = 0; value < whole; value += kStep) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(values + (r + ahead) * ldv + value);
      __builtin_prefetch(metadata + (r + ahead) * ldm + value / 4);
    }
    step(value, 4, 0xFFFF);
  }
  if (whole < count) step(whole, (count - whole + 3) / 4, static_cast<__mmask16>((1u << (count - whole)) - 1));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t * lds + r] = _mm512_reduce_add_ps(sum[r][t]);
}

#else

template <typename S, int N, int T, int R>
inline void rows_times_few_tokens(
    const float* kept, int64_t ldk, const S* values, int64_t ldv, const uint8_t* metadata, int64_t ldm, int64_t groups,
    float* sums, int64_t lds) {
  for (int r = 0; r < R; ++r) {
    // As many sums a token as a vector has lanes: a single one would wait for itself at every value, and round worse.
    float sum[T][kStep] = {};
    for (int64_t value = 0; value < groups * N; ++value) {
      const uint32_t code = (metadata[r * ldm + value / 4] >> (2 * (value % 4))) & 3;
      const float w = static_cast<float>(values[r * ldv + value]);
      for (int t = 0; t < T; ++t) sum[t][value % kStep] += w * kept[t * ldk + (value / N) * 4 + code];
    }
    for (int t = 0; t < T; ++t) {
      for (int64_t half = kStep / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sum[t][i] += sum[t][i + half];
      sums[t * lds + r] = sum[t][0];
    }
  }
}

#endif

// sums[t][r] of R rows and any number of tokens, four at a time: the rows stay in the L1 cache from one pass to the next.
template <typename S, int N, int R>
inline void rows_times_tokens_by_four(
    const float* kept, int64_t ldk, const S* values, int64_t ldv, const uint8_t* metadata, int64_t ldm, int64_t groups,
    int64_t tokens, float* sums, int64_t lds) {
  for (int64_t t = 0; t < tokens; t += 4) {
    const float* from = kept + t * ldk;
    float* to = sums + t * lds;
    switch (tokens - t) {
      case 1: rows_times_few_tokens<S, N, 1, R>(from, ldk, values, ldv, metadata, ldm, groups, to, lds); break;
      case 2: rows_times_few_tokens<S, N, 2, R>(from, ldk, values, ldv, metadata, ldm, groups, to, lds); break;
      case 3: rows_times_few_tokens<S, N, 3, R>(from, ldk, values, ldv, metadata, ldm, groups, to, lds); break;
      default: rows_times_few_tokens<S, N, 4, R>(from, ldk, values, ldv, metadata, ldm, groups, to, lds);
    }
  }
}

// tile [tokens][ldt] = x @ rows.T for `rows` rows of one block and a few tokens.
template <typename S, int N>
inline void block_times_few_tokens(
    const float* kept, int64_t ldk, const S* values, int64_t ldv, const uint8_t* metadata, int64_t ldm, int64_t groups,
    int64_t rows, int64_t tokens, float* tile, int64_t ldt) {
  constexpr int R = 4;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    rows_times_tokens_by_four<S, N, R>(
        kept, ldk, values + r * ldv, ldv, metadata + r * ldm, ldm, groups, tokens, tile + r, ldt);
  for (; r < rows; ++r)
    rows_times_tokens_by_four<S, N, 1>(
        kept, ldk, values + r * ldv, ldv, metadata + r * ldm, ldm, groups, tokens, tile + r, ldt);
}

}  // namespace vnm
