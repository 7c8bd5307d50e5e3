// Activations as integers of 8 bits: a token's are multiples of its largest magnitude / 127, so that its product with levels
// is one of integers, and is scaled once a token. They are floats again where kernels multiply floats, and bytes, 128 more
// than they are, where vpdpbusd multiplies unsigned bytes by signed ones.
#pragma once
#include "sparse_rows.h"

namespace vnm {

constexpr float kMostLevel = 127.f, kLeastMagnitude = 1e-30f;
constexpr int32_t kByteZero = 128;

// The largest magnitude of `count` activations: NaN where one is.
template <typename S>
inline float largest_magnitude(const S* x, int64_t count) {
  Vec most(0.f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = at::vec::maximum(most, load_vector(x + i).abs());
  float lanes[kLanes];
  most.store(lanes);
  float largest = 0.f;
  const auto take = [&](float magnitude) {
    if (largest == largest && !(magnitude <= largest)) largest = magnitude;
  };
  for (const float lane : lanes) take(lane);
  for (; i < count; ++i) take(std::abs(static_cast<float>(x[i])));
  return largest;
}

// Rounded activations, as S or as bytes.
template <typename S>
inline void store_rounded(Vec levels, S* to, int64_t count) {
  float lanes[kLanes];
  levels.store(lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(lanes[i]);
}
inline void store_rounded(Vec levels, uint8_t* to, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i bytes = _mm512_add_epi32(_mm512_cvtps_epi32(levels), _mm512_set1_epi32(kByteZero));
  _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), _mm512_cvtepi32_epi8(bytes));
#else
  float lanes[kLanes];
  levels.store(lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>(lanes[i]) + kByteZero);
#endif
}

// Round a token's `count` activations; returns what a level is worth. Where one is NaN or infinite that is NaN or infinite
// and all levels are 0, so that the token's products are NaN; next to nothing is nothing.
template <typename S, typename E>
inline float round_token(const S* x, int64_t count, E* to) {
  const float largest = largest_magnitude(x, count);
  const bool usable = largest > kLeastMagnitude && largest <= std::numeric_limits<float>::max();
  const float step = usable || !(largest <= kLeastMagnitude) ? largest / kMostLevel : 0.f;
  const Vec inverse(usable ? kMostLevel / largest : 0.f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t real = std::min(kLanes, count - i);
    Vec given(0.f);
    if (usable && real == kLanes) {
      given = load_vector(x + i);
    } else if (usable) {
      float lanes[kLanes] = {};
      for (int64_t k = 0; k < real; ++k) lanes[k] = static_cast<float>(x[i + k]);
      given = Vec::loadu(lanes);
    }
    store_rounded((given * inverse).round(), to + i, real);
  }
  return step;
}

// tile [tokens][ld] times what a token's levels are worth.
inline void scale_tokens(const float* steps, int64_t tokens, int64_t rows, float* tile, int64_t ld) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t count = std::min(kLanes, rows - r);
      (Vec::loadu(tile + t * ld + r, count) * Vec(steps[t])).store(tile + t * ld + r, count);
    }
}

}  // namespace vnm
