// AVX-512 building blocks: transposes of 16 x 16 dwords, packing of GEMM operands, conversions.
//
// A bf16 GEMM operand B (K, N) is stored as "VNNI" dwords: for even k, dword (k / 2, n) holds B[k, n], B[k + 1, n]. In fp32 a
// dword is one element. A matrix of T is therefore often seen here as a matrix of dwords, `kPerDword<T>` elements each.
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emoe {

using c10::BFloat16;

constexpr int64_t kLanes = 16;  // fp32 or dword lanes of a 512-bit register
template <typename T>
constexpr int64_t kPerDword = sizeof(float) / sizeof(T);

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1u);
}

// Sixteen rows of sixteen dwords, transposed in registers (four rounds of 16 shuffles).
inline void transpose_16x16(__m512i row[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    row[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    row[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    row[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    row[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < 4; i++) {
      const __m512i a = row[8 * half + i], b = row[8 * half + 4 + i];
      t[8 * half + i] = _mm512_shuffle_i32x4(a, b, 0x88);
      t[8 * half + 4 + i] = _mm512_shuffle_i32x4(a, b, 0xDD);
    }
  }
  for (int i = 0; i < 8; i++) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    row[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
  }
}

inline void transpose_16x16(__m512 row[16]) { transpose_16x16(reinterpret_cast<__m512i*>(row)); }

// Round to nearest even; a NaN stays a NaN.
inline __m256i to_bf16(__m512 value) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
#endif
}

inline __m512 from_bf16(__m256i value) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
}

inline __m512 load(const float* from, __mmask16 lanes = 0xFFFF) { return _mm512_maskz_loadu_ps(lanes, from); }
inline __m512 load(const BFloat16* from, __mmask16 lanes = 0xFFFF) {
  return from_bf16(_mm256_maskz_loadu_epi16(lanes, from));
}
inline void store(float* to, __m512 value, __mmask16 lanes = 0xFFFF) { _mm512_mask_storeu_ps(to, lanes, value); }
inline void store(BFloat16* to, __m512 value, __mmask16 lanes = 0xFFFF) {
  _mm256_mask_storeu_epi16(to, lanes, to_bf16(value));
}

// columns[j] (count) -> dst (width / kPerDword, padded) dwords: column j of dst is the row columns[j] of `width`
// elements; columns from `count` to `padded` (a multiple of 16) are zero. Gathers and transposes in one pass.
template <typename T>
void pack_transposed(const T* const* columns, int64_t count, int64_t padded, int64_t width, int32_t* dst) {
  const int64_t dwords = width / kPerDword<T>;
  for (int64_t j = 0; j < padded; j += kLanes) {
    const int64_t live = std::clamp<int64_t>(count - j, 0, kLanes);
    for (int64_t d = 0; d < dwords; d += kLanes) {
      const __mmask16 lanes = first_lanes(dwords - d);
      __m512i block[16];
      for (int64_t i = 0; i < kLanes; i++) {
        block[i] = i < live ? _mm512_maskz_loadu_epi32(lanes, reinterpret_cast<const int32_t*>(columns[j + i]) + d)
                            : _mm512_setzero_si512();
      }
      transpose_16x16(block);
      const int64_t rows = std::min(kLanes, dwords - d);
      for (int64_t i = 0; i < rows; i++) _mm512_storeu_si512(dst + (d + i) * padded + j, block[i]);
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
      const __mmask16 lanes = first_lanes(width - j);
      __m512i value = _mm512_setzero_si512();
      if (low) value = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, low + j));
      if (high) {
        const __m512i upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, high + j));
        value = _mm512_or_si512(value, _mm512_slli_epi32(upper, 16));
      }
      _mm512_mask_storeu_epi32(to + j, lanes, value);
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
      __m512 block[16];
      for (int64_t i = 0; i < kLanes; i++) {
        block[i] = i < live ? load(src + (r + i) * ld + c, first_lanes(wide)) : _mm512_setzero_ps();
      }
      transpose_16x16(block);
      for (int64_t i = 0; i < wide; i++) store(dst + (c + i) * dst_ld + r, block[i], first_lanes(live));
    }
  }
}

}  // namespace emoe
