// What the sweeps of backward need for few tokens: products with a weight's natural rows, and sums of outer products.
#pragma once

#include "common.h"

namespace emoe {

// out[m] (cols) = sum over r of x[m][r] * w[r] for TOKENS tokens: w (rows, cols) is read once, row by row. With many
// registers experts of up to 96 neurons take one pass.
template <int TOKENS, typename T>
void sum_of_rows(const T* w, int64_t ld, int64_t rows, int64_t cols, const float* const* x, float* const* out) {
  constexpr int kVectors = kManyRegisters ? 6 : 3;
  for (int64_t c = 0; c < cols; c += kVectors * kLanes) {
    Lanes lanes[kVectors];
    Floats acc[TOKENS][kVectors];
    for (int v = 0; v < kVectors; v++) {
      lanes[v] = first_lanes(std::max<int64_t>(cols - c - v * kLanes, 0));
      for (int m = 0; m < TOKENS; m++) acc[m][v] = zeros();
    }
    for (int64_t r = 0; r < rows; r++) {
      const T* row = w + r * ld + c;
#pragma GCC unroll 8  // else GCC 12 keeps the accumulators of AVX2, pairs of registers, in memory
      for (int v = 0; v < kVectors; v++) {
        // eight rows ahead: neighbouring rows of down lie in different pages, where no hardware prefetcher follows
        if (v * sizeof(T) % sizeof(float) == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(row + 8 * ld + v * kLanes), _MM_HINT_T0);
        }
        const Floats value = load(row + v * kLanes, lanes[v]);
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; m++) acc[m][v] = fma(value, all(x[m][r]), acc[m][v]);
      }
    }
    for (int m = 0; m < TOKENS; m++) {
      for (int v = 0; v < kVectors; v++) store(out[m] + c + v * kLanes, acc[m][v], lanes[v]);
    }
  }
}

// Any number of tokens, kTile at a time.
template <typename T>
void sum_of_rows(const T* w, int64_t ld, int64_t rows, int64_t cols, const float* const* x, float* const* out,
                 int64_t tokens) {
  constexpr int kTile = kManyRegisters ? 4 : 2;
  int64_t m = 0;
  for (; m + kTile <= tokens; m += kTile) sum_of_rows<kTile>(w, ld, rows, cols, x + m, out + m);
  switch (tokens - m) {
    case 3: return sum_of_rows<3>(w, ld, rows, cols, x + m, out + m);
    case 2: return sum_of_rows<2>(w, ld, rows, cols, x + m, out + m);
    case 1: return sum_of_rows<1>(w, ld, rows, cols, x + m, out + m);
  }
}

// sums[tokens[i]] (width) += sum over s of h[i][s] * w[s] for `count` pairs; h (count, S) with leading dimension S.
template <typename T>
void add_weighted_rows(const T* w, int64_t ld, int64_t S, int64_t width, const T* h, const int32_t* tokens,
                       int64_t count, float* sums) {
  constexpr int kRows = 4;  // rows added at a time: a quarter of the traffic to the sums
  const auto add = [&](auto rows, int64_t s) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const Lanes lanes = first_lanes(width - j);
      Floats value[kRows];
      for (int r = 0; r < rows(); r++) value[r] = load(w + (s + r) * ld + j, lanes);
      for (int64_t i = 0; i < count; i++) {
        float* to = sums + tokens[i] * width + j;
        Floats sum = load(to, lanes);
        for (int r = 0; r < rows(); r++) {
          sum = fma(value[r], all(static_cast<float>(h[i * S + s + r])), sum);
        }
        store(to, sum, lanes);
      }
    }
  };
  int64_t s = 0;
  for (; s + kRows <= S; s += kRows) add(std::integral_constant<int, kRows>{}, s);
  for (; s < S; s++) add(std::integral_constant<int, 1>{}, s);
}

// out[s] (width) = sum over i < count of h[s * ld + i] * rows[i]: a block of a weight's gradient, S rows.
template <typename T>
void outer_products(const T* h, int64_t ld, int64_t S, const T* const* rows, int64_t count, int64_t width, float* out) {
  constexpr int kRows = kManyRegisters ? 8 : 4;  // of the gradient, made together: they share the loads of the tokens
  const auto some = [&](auto n, int64_t s) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const Lanes lanes = first_lanes(width - j);
      Floats sum[kRows];
      for (int r = 0; r < n(); r++) sum[r] = zeros();
      for (int64_t i = 0; i < count; i++) {
        const Floats token = load(rows[i] + j, lanes);
        for (int r = 0; r < n(); r++) {
          sum[r] = fma(token, all(static_cast<float>(h[(s + r) * ld + i])), sum[r]);
        }
      }
      for (int r = 0; r < n(); r++) store(out + (s + r) * width + j, sum[r], lanes);
    }
  };
  int64_t s = 0;
  for (; s + kRows <= S; s += kRows) some(std::integral_constant<int, kRows>{}, s);
  for (; s < S; s++) some(std::integral_constant<int, 1>{}, s);
}

}  // namespace emoe
