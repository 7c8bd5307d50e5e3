// Sparse rows times dense tokens: the arithmetic of V:N:M on a CPU.
//
// Three kernels, all over rows of one V block. They differ in what lies in the lanes of a vector:
//
//   groups   few_tokens.h, few_tokens_bf16.h    few tokens: every compressed byte is read once and in order, as it is stored
//   rows     row_lanes.h                        more tokens, with AVX-512, where a block has rows enough to fill a vector
//   tokens   token_lanes.h                      more tokens, everywhere else
//
// kept.h gathers what a token has in the columns that a block keeps, which the first two begin with; rows.h reads values.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define VNM_BF16_PAIRS 1  // vdpbf16ps: a dot product of two pairs of bf16 a lane; vpmultishiftqb
#endif

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define VNM_BYTE_QUADS 1  // vpdpbusd: a dot product of four pairs of bytes a lane; vpermi2b
#endif

namespace vnm {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

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

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Floats at a cache line's start: an unaligned vector load would touch two lines.
inline Buffer aligned_buffer(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  return Buffer(static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
}

#if defined(VNM_BYTE_QUADS)
// The first `count` of 64 lanes; none where that is negative.
inline __mmask64 first_lanes(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << std::max<int64_t>(count, 0)) - 1;
}
#endif

// Whether the two values of a group are multiplied together, by vdpbf16ps.
#if defined(VNM_BF16_PAIRS)
template <typename S, int N>
constexpr bool kPairs = N == 2 && std::is_same_v<S, at::BFloat16>;
#else
template <typename S, int N>
constexpr bool kPairs = false;
#endif

// Whether activations are bytes, of which four are multiplied together.
template <typename S>
constexpr bool kQuads = std::is_same_v<S, uint8_t>;

// Whether many tokens are multiplied with rows in the lanes of a vector, which blocks of V rows have to fill.
#if defined(CPU_CAPABILITY_AVX512)
template <int64_t V>
constexpr bool kRowLanes = V >= kLanes;
#else
template <int64_t V>
constexpr bool kRowLanes = false;
#endif

// Whether they are so as bytes, where they are rounded.
#if defined(VNM_BYTE_QUADS)
template <int64_t V>
constexpr bool kByteLanes = kRowLanes<V>;
#else
template <int64_t V>
constexpr bool kByteLanes = false;
#endif

#if defined(CPU_CAPABILITY_AVX512)

inline __m512 widen(__m256i words, const at::BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline __m512 widen(__m256i words, const at::Half*) { return _mm512_cvtph_ps(words); }

inline __m512 load_values(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
template <typename S>
inline __m512 load_values(const S* p, __mmask16 mask) {
  return widen(_mm256_maskz_loadu_epi16(mask, p), p);
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

// How many products of fp32, a multiple of 8, are added up before their sum is added to that of the ones before. Every
// addition rounds, and dense kernels add up in blocks (MKL in as few of equal width as have no more than kDenseColumns).
// Sums of no more products than such a block has kept values, or than there are blocks, round no worse.
constexpr int64_t kDenseColumns = 192;
constexpr int64_t longest_sum(int64_t in_features, int64_t n, int64_t m) {
  const int64_t blocks = (in_features + kDenseColumns - 1) / kDenseColumns;
  const int64_t kept = (in_features + blocks - 1) / blocks * n / m;
  return std::max<int64_t>(8, std::max(kept, blocks) / 8 * 8);
}

// Rows of a tile, at most.
constexpr int64_t kMostRows = 64;

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

// Fetch what comes after `kBytes` of values of R rows, and after their metadata, `kBytes / kRatio`. Row by row a weight is
// one stream, in which a few KB ahead keep as many lines on the way as the memory serves. Rows side by side are too short for
// that, and for a hardware prefetcher: there the same place of rows some 16 KB on is fetched.
template <int R, int64_t kBytes, int64_t kRatio, typename S>
inline void prefetch_rows(const S* values, int64_t ldv, const uint8_t* metadata, int64_t ldm) {
  constexpr int64_t kLine = 64, kStream = 8192;
  if constexpr (R == 1) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(values) + kStream;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBytes; i += kLine) __builtin_prefetch(bytes + i);
    __builtin_prefetch(metadata + kStream / kRatio);
  } else {
    const int64_t ahead = R * std::max<int64_t>(1, 16384 / (R * ldv * static_cast<int64_t>(sizeof(S))));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(values + (r + ahead) * ldv);
      __builtin_prefetch(metadata + (r + ahead) * ldm);
    }
  }
}

template <int I>
using Is = std::integral_constant<int, I>;

// Call `pass` for 1, 2, 3, or 4 and more tokens with how many these are, how many rows to take side by side, and how many
// sums to add a row's steps to in turn. Up to 3 tokens memory is what there is to wait for; with 4 a table read for one row
// serves others too: as many rows as registers hold the sums of, which where groups are Scaled are two for each.
template <bool Scaled, typename F>
inline void for_few_tokens(int64_t tokens, const F& pass) {
  switch (tokens) {
    case 1: return pass(Is<1>(), Is<1>(), Is<4>());
    case 2: return pass(Is<2>(), Is<1>(), Is<2>());
    case 3: return pass(Is<3>(), Is<1>(), Is<1>());
    default: return pass(Is<4>(), Is<(Scaled ? 2 : 4)>(), Is<1>());
  }
}

}  // namespace vnm
