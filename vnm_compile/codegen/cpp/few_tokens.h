// rows_times_few_tokens: groups in the vector lanes, where there are so few tokens that only the weight's bytes count. The
// kept activations of 8 groups (N = 2) fill two registers, and a permute by the indices lines them up with 16 values:
//
//     values    | v0 v1 | v2 v3 | v4 v5 | ...       16 of 8 groups, as stored
//     indices   | i0 i1 | i2 i3 | i4 i5 | ...       32 bits of metadata, spread over the lanes
//     kept      | k0 k1 k2 k3 | k4 k5 k6 k7 | ...   gathered once a block
#pragma once
#include "few_tokens_bf16.h"
#include "kept.h"
#include "rows.h"
#include "sparse_rows.h"

namespace vnm {

// Tokens up to which groups in the lanes are the best: a permute a token and step is cheaper than a broadcast, an address and
// a load a value, and cheaper than laying out rows for so few.
#if defined(CPU_CAPABILITY_AVX512)
template <int64_t V>
constexpr int64_t kFewTokens = kRowLanes<V> ? 8 : 12;
#else
template <int64_t V>
constexpr int64_t kFewTokens = 4;
#endif

#if defined(CPU_CAPABILITY_AVX512)

// sums[t][r] of R rows and T tokens. Steps are added in turn to U sums, or, where groups of values are scaled, to one for each
// of these. `kept` [T][ldk], zero from groups * 4 up to a multiple of 64.
template <int N, int T, int R, int U, typename W>
inline void rows_times_few_tokens(
    const float* kept, int64_t ldk, const W& weight, const uint8_t* metadata, int64_t ldm, int64_t groups, float* sums,
    int64_t lds) {
  constexpr bool kScaled = kScalesGroups<W>;
  constexpr int kRun = kScaled ? static_cast<int>(W::kGroup / kStep) : 1;  // steps that share a scale
  constexpr int kSums = kScaled ? 1 : U, kTurn = std::max(kRun, U);
  using Sums = __m512[R][T];
  Sums sum[kSums];
#pragma GCC unroll 4
  for (int u = 0; u < kSums; ++u) clear(sum[u]);
  // One step of all rows; `value` counts values from the start of a row, `bytes` those of metadata to read.
  const auto step = [&](int64_t value, size_t bytes, __mmask16 real, Sums& to) __attribute__((always_inline)) {
    __m512i index[R];
    __m512 values[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint32_t codes = 0;
      std::memcpy(&codes, metadata + r * ldm + value / 4, bytes);
      index[r] = step_index<N>(codes);
      values[r] = W::floats(weight.at(r, value), real);
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
        to[r][t] = _mm512_fmadd_ps(values[r], picked, to[r][t]);
      }
    }
  };
  // Steps that share a scale, of all of which as many values are real.
  const auto run = [&](int64_t value, auto steps, size_t bytes, __mmask16 real) __attribute__((always_inline)) {
    Sums part;
    clear(part);
#pragma GCC unroll 8
    for (int s = 0; s < decltype(steps)::value; ++s) step(value + s * kStep, bytes, real, part);
    add_scaled(part, weight, value, sum[0]);
  };
  const int64_t count = groups * N, whole = count / kStep * kStep;
  int64_t value = 0;
  for (; value + kTurn * kStep <= whole; value += kTurn * kStep) {
    prefetch_rows<R, W::bytes(kTurn * kStep), W::bytes(4)>(weight.at(0, value), weight.ld, metadata + value / 4, ldm);
#pragma GCC unroll 8
    for (int u = 0; u < kTurn; u += kRun) {
      if constexpr (kScaled)
        run(value + u * kStep, Is<kRun>(), 4, 0xFFFF);
      else
        step(value + u * kStep, 4, 0xFFFF, sum[u]);
    }
  }
  const auto last = [&](int64_t from, size_t bytes, __mmask16 real) __attribute__((always_inline)) {
    if constexpr (kScaled)
      run(from, Is<1>(), bytes, real);
    else
      step(from, bytes, real, sum[0]);
  };
  for (; value < whole; value += kStep) last(value, 4, 0xFFFF);
  if (whole < count) last(whole, (count - whole + 3) / 4, static_cast<__mmask16>((1u << (count - whole)) - 1));
  finish(sum, weight);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t * lds + r] = _mm512_reduce_add_ps(sum[0][r][t]);
}

#else

template <int N, int T, int R, int U, typename W>
inline void rows_times_few_tokens(
    const float* kept, int64_t ldk, const W& weight, const uint8_t* metadata, int64_t ldm, int64_t groups, float* sums,
    int64_t lds) {
  for (int r = 0; r < R; ++r) {
    // As many sums a token as a vector has lanes: a single one would wait for itself at every value, and round worse.
    float sum[T][kStep] = {}, values[kStep];
    const int64_t count = groups * N;
    for (int64_t first = 0; first < count; first += kStep) {
      const int64_t real = std::min(kStep, count - first);
      weight.unpack(r, first, real, values);
      for (int64_t i = 0; i < real; ++i) {
        const int64_t value = first + i;
        const uint32_t code = (metadata[r * ldm + value / 4] >> (2 * (i % 4))) & 3;
        for (int t = 0; t < T; ++t) sum[t][i] += values[i] * kept[t * ldk + (value / N) * 4 + code];
      }
    }
    for (int t = 0; t < T; ++t) {
      for (int64_t half = kStep / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sum[t][i] += sum[t][i + half];
      sums[t * lds + r] = sum[t][0];
    }
  }
}

#endif

// Floats of scratch that the kept activations of one token take: what a step of groups reads, and what a gather writes.
constexpr int64_t kept_size(int64_t groups) { return (groups * 4 + 63) / 64 * 64 + 16; }

// Rows that stay in the L1 cache from four tokens to the next four.
constexpr int64_t kCachedRows = 4;

// tile [tokens][ldt] = x @ rows.T for `rows` rows of one block and a few tokens; x [tokens][ldx]. `scratch`
// [tokens][kept_size] starts as zeros.
template <typename S, int N, typename C, typename W>
inline void block_times_few_tokens(
    const S* x, int64_t ldx, const C* columns, int64_t m, int64_t in_features, float* scratch, const W& weight,
    const uint8_t* metadata, int64_t ldm, int64_t groups, int64_t rows, int64_t tokens, float* tile, int64_t ldt) {
  // The next block begins with its columns, and would wait for them.
  for (int64_t i = 0; i < groups * 4; i += 64 / static_cast<int64_t>(sizeof(C)))
    __builtin_prefetch(columns + groups * 4 + i, 0, 2);
#if defined(VNM_BF16_PAIRS)
  if constexpr (kPairs<S, N>) {
    auto* words = reinterpret_cast<uint16_t*>(scratch);
    const int64_t ldw = kept_words(groups);
    gather_kept(x, ldx, tokens, columns, groups, m, in_features, words, ldw);
    block_times_few_words(words, ldw, weight, metadata, ldm, groups, rows, tokens, tile, ldt);
    return;
  }
#endif
  const int64_t ldk = kept_size(groups);
  gather_kept(x, ldx, tokens, columns, groups, m, in_features, scratch, ldk);
  // Four tokens at a time.
  for (int64_t first = 0; first < rows; first += kCachedRows) {
    const int64_t stop = std::min(rows, first + kCachedRows);
    for (int64_t t = 0; t < tokens; t += 4) {
      const auto pass = [&](auto count, auto together, auto steps) {
        constexpr int T = decltype(count)::value, R = decltype(together)::value, U = decltype(steps)::value;
        const auto multiply = [&](auto side, int64_t r) __attribute__((always_inline)) {
          rows_times_few_tokens<N, T, decltype(side)::value, U>(
              scratch + t * ldk, ldk, weight.rows(r), metadata + r * ldm, ldm, groups, tile + t * ldt + r, ldt);
        };
        int64_t r = first;
        for (; r + R <= stop; r += R) multiply(together, r);
        for (; r < stop; ++r) multiply(Is<1>(), r);
      };
      for_few_tokens<kScalesGroups<W>>(tokens - t, pass);
    }
  }
}

}  // namespace vnm
