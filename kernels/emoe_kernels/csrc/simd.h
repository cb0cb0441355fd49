// Building blocks: packing of GEMM operands, transposes.
//
// A bf16 GEMM operand B (K, N) is stored as "VNNI" dwords: for even k, dword (k / 2, n) holds B[k, n], B[k + 1, n]. In fp32 a
// dword is one element. A matrix of T is therefore often seen here as a matrix of dwords, `kPerDword<T>` elements each.
#pragma once

#include <type_traits>

#include "wide.h"

namespace emoe {

template <typename T>
constexpr int64_t kPerDword = sizeof(float) / sizeof(T);

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// columns[j] (count) -> dst (width / kPerDword, padded) dwords: column j of dst is the row columns[j] of `width`
// elements; columns from `count` to `padded` (a multiple of 16) are zero. Gathers and transposes in one pass.
template <typename T>
void pack_transposed(const T* const* columns, int64_t count, int64_t padded, int64_t width, int32_t* dst) {
  const int64_t dwords = width / kPerDword<T>;
  for (int64_t j = 0; j < padded; j += kLanes) {
    const int64_t live = std::clamp<int64_t>(count - j, 0, kLanes);
    for (int64_t d = 0; d < dwords; d += kLanes) {
      const Lanes lanes = first_lanes(dwords - d);
      Dwords block[16];
      for (int64_t i = 0; i < kLanes; i++) {
        block[i] = i < live ? load_dwords(reinterpret_cast<const int32_t*>(columns[j + i]) + d, lanes) : no_dwords();
      }
      transpose_16x16(block);
      const int64_t rows = std::min(kLanes, dwords - d);
      for (int64_t i = 0; i < rows; i++) store_dwords(dst + (d + i) * padded + j, block[i]);
    }
  }
}

// rows[i] (count) of `width` elements -> the operand B (padded, width), rows from `count` to `padded` zero.
// fp32: a copy, leading dimension width. bf16: neighbouring rows interleaved, (padded / 2, width) dwords; padded even.
inline void pack_rows(const float* const* rows, int64_t count, int64_t padded, int64_t width, float* dst) {
  for (int64_t i = 0; i < padded; i++, dst += width) {
    if (i < count) {
      std::memcpy(dst, rows[i], width * sizeof(float));
    } else {
      std::memset(dst, 0, width * sizeof(float));
    }
  }
}

inline void pack_rows(const BFloat16* const* rows, int64_t count, int64_t padded, int64_t width, BFloat16* dst) {
  auto* to = reinterpret_cast<int32_t*>(dst);
  for (int64_t i = 0; i < padded; i += 2, to += width) {
    const BFloat16* low = i < count ? rows[i] : nullptr;
    const BFloat16* high = i + 1 < count ? rows[i + 1] : nullptr;
    for (int64_t j = 0; j < width; j += kLanes) {
      const Lanes lanes = first_lanes(width - j);
      const Halves none = _mm256_setzero_si256();
      const Halves lower = low ? load_halves(low + j, lanes) : none, upper = high ? load_halves(high + j, lanes) : none;
      store_dwords(to + j, interleave(lower, upper), lanes);
    }
  }
}

// src (rows, cols) with leading dimension ld -> dst (cols, rows) of T: element (r, c) goes to dst[c * dst_ld + r].
template <typename From, typename T>
void store_transposed(const From* src, int64_t ld, int64_t rows, int64_t cols, T* dst, int64_t dst_ld) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t live = std::min(kLanes, rows - r);
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t wide = std::min(kLanes, cols - c);
      Floats block[16];
      for (int64_t i = 0; i < kLanes; i++) {
        block[i] = i < live ? load(src + (r + i) * ld + c, first_lanes(wide)) : zeros();
      }
      transpose_16x16(block);
      for (int64_t i = 0; i < wide; i++) store(dst + (c + i) * dst_ld + r, block[i], first_lanes(live));
    }
  }
}

}  // namespace emoe
