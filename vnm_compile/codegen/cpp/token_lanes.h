// rows_times_tokens: tokens in the vector lanes. x is transposed once, so that a column of the weight is a row of tokens; a
// value is broadcast, its 2-bit index picks one of the block's 4 column addresses, and one FMA a vector of tokens does only
// the N/M of the work that is not zero:
//
//     xt   [in_features][tokens]         acc [rows][tokens]
//     column g*M+c0  | | | | | | | |
//     column g*M+c1  |#|#|#|#|#|#|#|  x value ->  += row r
//     column g*M+c2  | | | | | | | |         (index 1)
//     column g*M+c3  | | | | | | | |
#pragma once
#include "rows.h"
#include "sparse_rows.h"

namespace vnm {

// x [tokens, columns] (row stride ldx) to xt [columns][ld]; lanes past `tokens` up to whole vectors are zero.
template <typename S>
inline void transpose(const S* x, int64_t ldx, int64_t tokens, int64_t columns, float* xt, int64_t ld) {
  alignas(64) float square[kLanes * kLanes], turned[kLanes * kLanes];
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const int64_t nt = std::min(kLanes, tokens - t);
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int64_t nk = std::min(kLanes, columns - k);
      const S* from = x + t * ldx + k;
      float* to = xt + k * ld + t;
      if constexpr (std::is_same_v<S, float>) {
        if (nt == kLanes && nk == kLanes) {
          at::vec::transpose_mxn<float>(from, ldx, to, ld, kLanes, kLanes);
          continue;
        }
      }
      if (nt < kLanes || nk < kLanes) {
        std::fill(square, square + kLanes * kLanes, 0.f);
      }
      if (nk == kLanes) {
        for (int64_t i = 0; i < nt; ++i) load_vector(from + i * ldx).store(square + i * kLanes);
      } else {
        for (int64_t i = 0; i < nt; ++i)
          for (int64_t j = 0; j < nk; ++j) square[i * kLanes + j] = static_cast<float>(from[i * ldx + j]);
      }
      at::vec::transpose_mxn<float>(square, kLanes, turned, kLanes, kLanes, kLanes);
      for (int64_t j = 0; j < nk; ++j) Vec::loadu(turned + j * kLanes).store(to + j * ld);
    }
  }
}

// Where the 4 kept columns of each group start in xt; columns past the last one point at a row of zeros.
template <typename C>
inline void column_offsets(
    const C* columns, int64_t groups, int64_t m, int64_t in_features, int64_t ld, int32_t* offsets) {
  int64_t g = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(C) == 1) {
    const auto step = static_cast<int>(m);
    const __m512i most = _mm512_set1_epi32(static_cast<int>(in_features)), scale = _mm512_set1_epi32(static_cast<int>(ld));
    __m512i start = _mm512_mullo_epi32(
        _mm512_set1_epi32(step), _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
    for (; g + 4 <= groups; g += 4) {
      const __m512i offset =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + g * 4)));
      const __m512i column = _mm512_min_epi32(_mm512_add_epi32(start, offset), most);
      _mm512_storeu_si512(offsets + g * 4, _mm512_mullo_epi32(column, scale));
      start = _mm512_add_epi32(start, _mm512_set1_epi32(4 * step));
    }
  }
#endif
  for (; g < groups; ++g) {
    for (int64_t c = 0; c < 4; ++c) {
      offsets[g * 4 + c] = static_cast<int32_t>(std::min<int64_t>(g * m + columns[g * 4 + c], in_features) * ld);
    }
  }
}

// One step of a row, unpacked: values in float, and where in xt each finds its column. Both are padded to a whole step
// with zeros and `zero_row`.
template <int N, typename W>
inline void unpack_step(
    const W& weight, int64_t r, int64_t value, const uint8_t* metadata, const int32_t* offsets, int64_t count,
    int32_t zero_row, float* weights, int32_t* rows) {
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
    const __m512 values = W::floats(weight.at(r, value), 0xFFFF);
    _mm512_storeu_ps(weights, W::kGroup == kNone ? values : _mm512_mul_ps(values, weight.scale(r, value)));
    return;
  }
#endif
  std::fill(weights, weights + kStep, 0.f);
  weight.unpack(r, value, count, weights);
  for (int64_t i = 0; i < kStep; ++i) {
    const bool real = i < count;
    const int64_t code = real ? (metadata[i / 4] >> (2 * (i % 4))) & 3 : 0;
    rows[i] = real ? offsets[(i / N) * 4 + code] : zero_row;
  }
}

// acc [R][ld] += the sum of Sum values of R rows, for NV vectors of tokens; weights and rows [R][kStep].
template <int NV, int R, int Sum>
inline void rows_times_tokens(const float* xt, const float* weights, const int32_t* rows, float* acc, int64_t ld) {
  Vec sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = Vec(0.f);
#pragma GCC unroll 4
  for (int i = 0; i < Sum; ++i) {
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

// As block_times_tokens, a value at a time. NV vectors of tokens.
template <int N, int Sum, int NV, typename W>
inline void block_times_tokens_by_values(
    const float* xt, const int32_t* offsets, int32_t zero_row, const W& weight, const uint8_t* metadata, int64_t ldm,
    int64_t groups, int64_t rows, int64_t tokens, float* acc, int64_t ld, float* tile, int64_t ldt) {
  // Sums of sums of sums, so that they round no worse than those of a dense kernel, which also adds up in blocks: in
  // registers over a step, or a half of one, in `part` over kPart of them, then in `acc`. A step keeps so few rows of tokens that these stay
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
        // Rows of a weight lie so far apart that no hardware prefetcher follows.
        __builtin_prefetch(weight.at(r, value + 2 * kStep));
        unpack_step<N>(
            weight, r, value, metadata + r * ldm + value / 4, offsets + value / N * 4, std::min(kStep, count - value),
            zero_row, weights + r * kStep, places + r * kStep);
      }
      int64_t r = 0;
      const auto add = [&](auto together) {
        for (int i = 0; i < kStep; i += Sum)
          rows_times_tokens<NV, decltype(together)::value, Sum>(
              xt, weights + r * kStep + i, places + r * kStep + i, to + r * ld, ld);
      };
      for (; r + R <= rows; r += R) add(Is<R>());
      for (; r < rows; ++r) add(Is<1>());
    }
    if (first > 0)
      for (int64_t i = 0; i < rows * ld; i += kLanes) (Vec::loadu(acc + i) + Vec::loadu(part + i)).store(acc + i);
  }
  transpose_tile(acc, ld, rows, tokens, tile, ldt);
}

// Tokens in a tile, at most: as many sums as fit into the registers for two rows.
constexpr int64_t kTokenLanesTokens = 4 * kLanes;

// tile [tokens][ldt] = x @ rows.T for up to kMostRows rows of one block; acc [2][rows][ld] is scratch. Of Sum values, all or a
// half of a step, sums are added up.
template <int N, int Sum, typename W>
inline void block_times_tokens(
    const float* xt, const int32_t* offsets, int32_t zero_row, const W& weight, const uint8_t* metadata, int64_t ldm,
    int64_t groups, int64_t rows, int64_t tokens, float* acc, int64_t ld, float* tile, int64_t ldt) {
  const auto by_values = [&](auto vectors) {
    block_times_tokens_by_values<N, Sum, decltype(vectors)::value>(
        xt, offsets, zero_row, weight, metadata, ldm, groups, rows, tokens, acc, ld, tile, ldt);
  };
  switch ((tokens + kLanes - 1) / kLanes) {
    case 1: return by_values(Is<1>());
    case 2: return by_values(Is<2>());
    case 3: return by_values(Is<3>());
    default: return by_values(Is<4>());
  }
}

}  // namespace vnm
