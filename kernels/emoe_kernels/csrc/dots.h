// Dot products of vectors with rows that lie in memory as they are: for few tokens an expert, and few queries a key.
#pragma once

#include "simd.h"

namespace emoe {

// acc += a . b over 16 fp32 lanes, or 32 bf16 elements.
template <typename T>
struct Dot;

template <>
struct Dot<float> {
  static constexpr int64_t kWidth = kLanes;
  using Register = Floats;
  static Register load(const float* p) { return emoe::load(p); }
  static Register load(const float* p, int64_t count) { return emoe::load(p, first_lanes(count)); }
  static Floats add(Floats acc, Register a, Register b) { return fma(a, b, acc); }
};

template <>
struct Dot<BFloat16> {
  static constexpr int64_t kWidth = 2 * kLanes;
  using Register = Dwords;
  static Register load(const BFloat16* p) { return load_dwords(p); }
  static Register load(const BFloat16* p, int64_t count) { return load_pairs(p, count); }
  static Floats add(Floats acc, Register a, Register b) { return add_products(acc, a, b); }
};

// out[i * out_ld + m] = rows[i] . x[m] for ROWS adjacent rows and TOKENS tokens.
template <int ROWS, int TOKENS, typename T>
void dot_rows(const T* w, int64_t ld, const T* const* x, int64_t D, float* out, int64_t out_ld) {
  using dot = Dot<T>;
  Floats acc[ROWS * TOKENS];
  for (auto& value : acc) value = zeros();
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
    store_sums_4x4(acc, out, out_ld);
  } else {
    for (int r = 0; r < ROWS; r++) {
      for (int m = 0; m < TOKENS; m++) out[r * out_ld + m] = sum_lanes(acc[r * TOKENS + m]);
    }
  }
}

// Any number of rows and tokens, in register tiles of at most kTile x kTile.
template <typename T>
void dot_block(const T* w, int64_t ld, int64_t rows, const T* const* x, int64_t tokens, int64_t D, float* out,
               int64_t out_ld) {
  constexpr int kTile = kManyRegisters ? 4 : 2;
  const auto some_tokens = [&](auto R, int64_t r) {
    int64_t m = 0;
    for (; m + kTile <= tokens; m += kTile) dot_rows<R(), kTile>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld);
    switch (tokens - m) {
      case 3: dot_rows<R(), 3>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld); break;
      case 2: dot_rows<R(), 2>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld); break;
      case 1: dot_rows<R(), 1>(w + r * ld, ld, x + m, D, out + r * out_ld + m, out_ld); break;
    }
  };
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile) some_tokens(std::integral_constant<int, kTile>{}, r);
  for (; r < rows; r++) some_tokens(std::integral_constant<int, 1>{}, r);
}

}  // namespace emoe
