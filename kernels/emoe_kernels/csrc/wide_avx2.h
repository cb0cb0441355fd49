// wide.h for AVX2 and FMA. oneDNN multiplies no bf16 there, so that what concerns bf16 has to compile and need not be fast.
#pragma once

namespace emoe {

struct Floats {
  __m256 low, high;
};
struct Dwords {
  __m256i low, high;
};
using Halves = __m256i;  // sixteen bf16
struct Lanes {
  int64_t count;
  bool full() const { return count >= kLanes; }
  __m256i low() const { return before(count); }
  __m256i high() const { return before(count - 8); }

 private:
  static __m256i before(int64_t count) {
    const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(std::clamp<int64_t>(count, 0, 8))), place);
  }
};
struct Mask {
  __m256 low, high;  // all bits of a lane, or none
};

constexpr bool kManyRegisters = false;  // eight of 16 lanes

inline Lanes first_lanes(int64_t count) { return {count}; }

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {  // a b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {  // c - a b
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) {  // b where one is NaN
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats nearest(Floats x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, how), _mm256_round_ps(x.high, how)};
}
inline Floats minus_abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_or_ps(x.low, sign), _mm256_or_ps(x.high, sign)};
}
// n integers from -252 to 254. In two factors, each a normal float, so that a subnormal result is rounded but once.
inline Floats times_power_of_2(Floats x, Floats n) {
  const auto scaled = [](__m256 x, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i k) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  };
  return {scaled(x.low, n.low), scaled(x.high, n.high)};
}
inline float sum_lanes(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline Mask every_lane() {
  const __m256 yes = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {yes, yes};
}
inline Mask at_least(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ)};
}
inline Mask not_less(Floats a, Floats b) {  // yes where one is NaN
  return {_mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ), _mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ)};
}
inline Mask at_least(Dwords a, Dwords b) {
  const auto compare = [](__m256i a, __m256i b) {
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_cmpgt_epi32(a, b), _mm256_cmpeq_epi32(a, b)));
  };
  return {compare(a.low, b.low), compare(a.high, b.high)};
}
inline bool any(Mask mask) { return _mm256_movemask_ps(_mm256_or_ps(mask.low, mask.high)) != 0; }
inline Floats choose(Mask mask, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low), _mm256_blendv_ps(no.high, yes.high, mask.high)};
}
inline Floats only(Mask mask, Floats yes) {
  return {_mm256_and_ps(mask.low, yes.low), _mm256_and_ps(mask.high, yes.high)};
}

inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load(const float* from, Lanes lanes) {
  if (lanes.full()) return load(from);
  return {_mm256_maskload_ps(from, lanes.low()), _mm256_maskload_ps(from + 8, lanes.high())};
}
inline void store(float* to, Floats value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}
inline void store(float* to, Floats value, Lanes lanes) {
  if (lanes.full()) return store(to, value);
  _mm256_maskstore_ps(to, lanes.low(), value.low);
  _mm256_maskstore_ps(to + 8, lanes.high(), value.high);
}

inline Floats as_floats(Dwords x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline Dwords as_dwords(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Dwords no_dwords() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Dwords all_dwords(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Dwords load_dwords(const void* from) {
  const auto* at = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Dwords load_dwords(const int32_t* from, Lanes lanes) {
  if (lanes.full()) return load_dwords(from);
  return {_mm256_maskload_epi32(from, lanes.low()), _mm256_maskload_epi32(from + 8, lanes.high())};
}
inline void store_dwords(int32_t* to, Dwords value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), value.high);
}
inline void store_dwords(int32_t* to, Dwords value, Lanes lanes) {
  if (lanes.full()) return store_dwords(to, value);
  _mm256_maskstore_epi32(to, lanes.low(), value.low);
  _mm256_maskstore_epi32(to + 8, lanes.high(), value.high);
}

// Round to nearest even; a NaN stays a NaN.
inline Halves to_bf16(Floats value) {
  alignas(32) float from[kLanes];
  alignas(32) BFloat16 to[kLanes];
  store(from, value);
  for (int64_t i = 0; i < kLanes; i++) to[i] = from[i];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(to));
}

// Sixteen dwords, the lower half of each from `low`.
inline Dwords interleave(Halves low, Halves high) {
  const auto merge = [](__m128i low, __m128i high) {
    return _mm256_or_si256(_mm256_cvtepu16_epi32(low), _mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16));
  };
  return {merge(_mm256_castsi256_si128(low), _mm256_castsi256_si128(high)),
          merge(_mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1))};
}

inline Floats from_bf16(Halves value) { return as_floats(interleave(_mm256_setzero_si256(), value)); }

inline Halves load_halves(const BFloat16* from, Lanes lanes) {
  alignas(32) BFloat16 values[kLanes] = {};
  std::memcpy(values, from, std::clamp<int64_t>(lanes.count, 0, kLanes) * sizeof(BFloat16));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
}
inline Floats load(const BFloat16* from, Lanes lanes = {kLanes}) { return from_bf16(load_halves(from, lanes)); }
inline void store(BFloat16* to, Floats value, Lanes lanes = {kLanes}) {
  const Halves rounded = to_bf16(value);
  std::memcpy(to, &rounded, std::clamp<int64_t>(lanes.count, 0, kLanes) * sizeof(BFloat16));
}

// The first `count` of 32 bf16.
inline Dwords load_pairs(const BFloat16* from, int64_t count) {
  alignas(64) BFloat16 values[2 * kLanes] = {};
  std::memcpy(values, from, count * sizeof(BFloat16));
  return load_dwords(values);
}

// acc + the sums of products of pairs of bf16.
inline Floats add_products(Floats acc, Dwords a, Dwords b) {
  const auto low = [](Dwords v) { return as_floats({_mm256_slli_epi32(v.low, 16), _mm256_slli_epi32(v.high, 16)}); };
  const auto high = [](Dwords v) {
    const __m256i upper = _mm256_set1_epi32(int32_t(0xFFFF0000));
    return as_floats({_mm256_and_si256(v.low, upper), _mm256_and_si256(v.high, upper)});
  };
  return fma(high(a), high(b), fma(low(a), low(b), acc));
}

inline void transpose_8x8(__m256 row[8]) {
  __m256 t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    row[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    row[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    row[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    row[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(row[i], row[4 + i], 0x20);
    t[4 + i] = _mm256_permute2f128_ps(row[i], row[4 + i], 0x31);
  }
  for (int i = 0; i < 8; i++) row[i] = t[i];
}

// Sixteen rows of sixteen, transposed: four blocks of 8 x 8, of which two change places.
inline void transpose_16x16(Floats row[16]) {
  for (int i = 0; i < kLanes; i += 8) {
    __m256 low[8], high[8];
    for (int j = 0; j < 8; j++) low[j] = row[i + j].low, high[j] = row[i + j].high;
    transpose_8x8(low);
    transpose_8x8(high);
    for (int j = 0; j < 8; j++) row[i + j] = {low[j], high[j]};
  }
  for (int j = 0; j < 8; j++) std::swap(row[j].high, row[8 + j].low);
}

inline void transpose_16x16(Dwords row[16]) {
  Floats turned[16];
  for (int i = 0; i < kLanes; i++) turned[i] = as_floats(row[i]);
  transpose_16x16(turned);
  for (int i = 0; i < kLanes; i++) row[i] = as_dwords(turned[i]);
}

// out[r * ld + m] = the sum of the lanes of acc[4 r + m].
inline void store_sums_4x4(const Floats* acc, float* out, int64_t ld) {
  for (int r = 0; r < 4; r++) {
    for (int m = 0; m < 4; m++) out[r * ld + m] = sum_lanes(acc[4 * r + m]);
  }
}

}  // namespace emoe
