// wide.h for AVX-512 (F, BW, DQ, VL; bf16 where there is it).
#pragma once

namespace emoe {

using Floats = __m512;
using Dwords = __m512i;
using Halves = __m256i;  // sixteen bf16
using Lanes = __mmask16;
using Mask = __mmask16;

constexpr bool kManyRegisters = true;  // 32 of 16 lanes

inline Lanes first_lanes(int64_t count) { return count >= kLanes ? Lanes(0xFFFF) : Lanes((1u << count) - 1u); }

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }                   // b where one is NaN
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline Floats minus_abs(Floats x) { return _mm512_or_ps(x, all(-0.f)); }
inline Floats times_power_of_2(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // n integers
inline float sum_lanes(Floats x) { return _mm512_reduce_add_ps(x); }

inline Mask every_lane() { return 0xFFFF; }
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask not_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }  // yes where one is NaN
inline Mask at_least(Dwords a, Dwords b) { return _mm512_cmpge_epi32_mask(a, b); }
inline bool any(Mask mask) { return mask != 0; }
inline Floats choose(Mask mask, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, mask, yes); }
inline Floats only(Mask mask, Floats yes) { return _mm512_maskz_mov_ps(mask, yes); }

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
inline void store(float* to, Floats value, Lanes lanes) { _mm512_mask_storeu_ps(to, lanes, value); }

inline Dwords no_dwords() { return _mm512_setzero_si512(); }
inline Dwords all_dwords(int32_t value) { return _mm512_set1_epi32(value); }
inline Dwords load_dwords(const void* from) { return _mm512_loadu_si512(from); }
inline Dwords load_dwords(const int32_t* from, Lanes lanes) { return _mm512_maskz_loadu_epi32(lanes, from); }
inline void store_dwords(int32_t* to, Dwords value) { _mm512_storeu_si512(to, value); }
inline void store_dwords(int32_t* to, Dwords value, Lanes lanes) { _mm512_mask_storeu_epi32(to, lanes, value); }

// Round to nearest even; a NaN stays a NaN.
inline Halves to_bf16(Floats value) {
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

inline Floats from_bf16(Halves value) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
}

inline Halves load_halves(const BFloat16* from, Lanes lanes) { return _mm256_maskz_loadu_epi16(lanes, from); }
inline Floats load(const BFloat16* from, Lanes lanes = 0xFFFF) { return from_bf16(load_halves(from, lanes)); }
inline void store(BFloat16* to, Floats value, Lanes lanes = 0xFFFF) {
  _mm256_mask_storeu_epi16(to, lanes, to_bf16(value));
}

// Sixteen dwords, the lower half of each from `low`.
inline Dwords interleave(Halves low, Halves high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// The first `count` of 32 bf16.
inline Dwords load_pairs(const BFloat16* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(__mmask32((1ull << count) - 1), from);
}

// acc + the sums of products of pairs of bf16.
inline Floats add_products(Floats acc, Dwords a, Dwords b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  const __m512i upper = _mm512_set1_epi32(int32_t(0xFFFF0000));
  const auto low = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
  const auto high = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), acc));
#endif
}

// Sixteen rows of sixteen dwords, transposed in registers (four rounds of 16 shuffles).
inline void transpose_16x16(Dwords row[16]) {
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

inline void transpose_16x16(Floats row[16]) { transpose_16x16(reinterpret_cast<__m512i*>(row)); }

// out[r * ld + m] = the sum of the lanes of acc[4 r + m]: 60 instructions where 16 reductions take 160.
inline void store_sums_4x4(const Floats* acc, float* out, int64_t ld) {
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
  const __m512 sums = fold(eight[0], eight[1], [](auto a, auto b) { return _mm512_shuffle_f32x4(a, b, 0x88); },
                           [](auto a, auto b) { return _mm512_shuffle_f32x4(a, b, 0xDD); });
  _mm_storeu_ps(out, _mm512_extractf32x4_ps(sums, 0));
  _mm_storeu_ps(out + ld, _mm512_extractf32x4_ps(sums, 1));
  _mm_storeu_ps(out + 2 * ld, _mm512_extractf32x4_ps(sums, 2));
  _mm_storeu_ps(out + 3 * ld, _mm512_extractf32x4_ps(sums, 3));
}

}  // namespace emoe
