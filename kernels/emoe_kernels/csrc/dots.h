// Dot products of vectors with rows that lie in memory as they are: for few tokens an expert, and few queries a key.
#pragma once

#include "simd.h"

namespace emoe {

// acc += a . b over 16 fp32 lanes, or 32 bf16 elements.
template <typename T>
struct Dot;

template <>
struct Dot<float> {
  static constexpr int64_t kWidth = 16;
  using Register = __m512;
  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static Register load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
  static __m512 add(__m512 acc, Register a, Register b) { return _mm512_fmadd_ps(a, b, acc); }
};

template <>
struct Dot<BFloat16> {
  static constexpr int64_t kWidth = 32;
  using Register = __m512i;
  static Register load(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static Register load(const BFloat16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(__mmask32((1ull << count) - 1), p);
  }
  static __m512 add(__m512 acc, Register a, Register b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    const __m512i upper = _mm512_set1_epi32(int32_t(0xFFFF0000));
    const auto low = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    const auto high = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
    return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), acc));
#endif
  }
};

// Lane i of the result is the sum of the lanes of acc[i]: 60 instructions where 16 reductions take 160.
inline __m512 reduce_16(const __m512* acc) {
  __m512 two[8], four[4], eight[2];
  const auto fold = [](__m512 a, __m512 b, auto low, auto high) { return _mm512_add_ps(low(a, b), high(a, b)); };
  for (int i = 0; i < 8; i++) {  // lanes of a 128-bit quarter: 0+2, 1+3 of each of the two
    two[i] = fold(acc[2 * i], acc[2 * i + 1], [](auto a, auto b) { return _mm512_unpacklo_ps(a, b); },
                  [](auto a, auto b) { return _mm512_unpackhi_ps(a, b); });
  }
  for (int i = 0; i < 4; i++) {
    four[i] = fold(two[2 * i], two[2 * i + 1], [](auto a, auto b) { return _mm512_shuffle_ps(a, b, 0x44); },
                   [](auto a, auto b) { return _mm512_shuffle_ps(a, b, 0xEE); });
  }
  for (int i = 0; i < 2; i++) {
    eight[i] = fold(four[2 * i], four[2 * i + 1], [](auto a, auto b) { return _mm512_shuffle_f32x4(a, b, 0x88); },
                    [](auto a, auto b) { return _mm512_shuffle_f32x4(a, b, 0xDD); });
  }
  return fold(eight[0], eight[1], [](auto a, auto b) { return _mm512_shuffle_f32x4(a, b, 0x88); },
              [](auto a, auto b) { return _mm512_shuffle_f32x4(a, b, 0xDD); });
}

// out[i * out_ld + m] = rows[i] . x[m] for ROWS adjacent rows and TOKENS tokens.
template <int ROWS, int TOKENS, typename T>
void dot_rows(const T* w, int64_t ld, const T* const* x, int64_t D, float* out, int64_t out_ld) {
  using dot = Dot<T>;
  __m512 acc[ROWS * TOKENS];
  for (auto& value : acc) value = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + dot::kWidth <= D; d += dot::kWidth) {
    typename dot::Register token[TOKENS];
    for (int m = 0; m < TOKENS; m++) token[m] = dot::load(x[m] + d);
    for (int r = 0; r < ROWS; r++) {
      const T* at = w + r * ld + d;
      _mm_prefetch(reinterpret_cast<const char*>(at + ROWS * ld), _MM_HINT_T1);  // past the end it is a no-op
      const auto value = dot::load(at);
      for (int m = 0; m < TOKENS; m++) acc[r * TOKENS + m] = dot::add(acc[r * TOKENS + m], value, token[m]);
    }
  }
  if (d < D) {
    for (int r = 0; r < ROWS; r++) {
      const auto value = dot::load(w + r * ld + d, D - d);
      for (int m = 0; m < TOKENS; m++) {
        acc[r * TOKENS + m] = dot::add(acc[r * TOKENS + m], value, dot::load(x[m] + d, D - d));
      }
    }
  }
  if constexpr (ROWS == 4 && TOKENS == 4) {
    const __m512 sums = reduce_16(acc);
    _mm_storeu_ps(out, _mm512_extractf32x4_ps(sums, 0));
    _mm_storeu_ps(out + out_ld, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(out + 2 * out_ld, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(out + 3 * out_ld, _mm512_extractf32x4_ps(sums, 3));
  } else {
    for (int r = 0; r < ROWS; r++) {
      for (int m = 0; m < TOKENS; m++) out[r * out_ld + m] = _mm512_reduce_add_ps(acc[r * TOKENS + m]);
    }
  }
}

// Any number of rows and tokens, in register tiles of at most 4 x 4.
template <typename T>
void dot_block(const T* w, int64_t ld, int64_t rows, const T* const* x, int64_t tokens, int64_t D, float* out,
               int64_t out_ld) {
  const auto some_tokens = [&](auto R, int64_t r) {
    int64_t m = 0;
    for (; m + 4 <= tokens; m += 4) dot_rows<R(), 4>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld);
    switch (tokens - m) {
      case 3: dot_rows<R(), 3>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld); break;
      case 2: dot_rows<R(), 2>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld); break;
      case 1: dot_rows<R(), 1>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld); break;
    }
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) some_tokens(std::integral_constant<int, 4>{}, r);
  for (; r < rows; r++) some_tokens(std::integral_constant<int, 1>{}, r);
}

}  // namespace emoe
