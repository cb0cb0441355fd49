// The forward pass for few tokens an expert: generation, mostly.
//
// Every chosen row of a weight is read once from memory, in the checkpoint's layout, and multiplied with the tokens
// that chose its expert; the tokens stay in the L1 cache. Rows further on are prefetched by hand, because a row of
// an expert ends before the hardware prefetcher has caught up with it.
#include "passes.h"

namespace emoe {

namespace {

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
__m512 reduce_16(const __m512* acc) {
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

constexpr int64_t kRows = 16;  // rows of an expert that are activated together

// Hidden values h (R, S) in the dtype of the weights, rows r0 .. r0 + rows - 1 of one expert.
template <Activation A, typename T>
void up_rows(const Call<T>& c, const Plan& plan, int64_t e, int64_t r0, int64_t rows, T* h, T* up_pre, T* gate_pre) {
  thread_local Scratch sums, pointers, copy;
  const int64_t first = plan.offsets[e], n = plan.offsets[e + 1] - first, S = c.S, D = c.D;
  const T** x = pointers.get<const T*>(n);
  for (int64_t i = 0; i < n; i++) x[i] = c.x + plan.tokens[first + i] * c.x_row;

  const int64_t ld = round_up(n, 4);
  float* up = sums.get<float>(2 * kRows * ld);
  float* gate = c.gate.data ? up + kRows * ld : nullptr;
  {
    const Block<T> w(c.up, e, r0, rows, 0, D, copy);
    dot_block(w.data, w.ld, rows, x, n, D, up, ld);
  }
  if (gate) {
    const Block<T> w(c.gate, e, r0, rows, 0, D, copy);
    dot_block(w.data, w.ld, rows, x, n, D, gate, ld);
  }
  alignas(64) float u[kRows] = {}, g[kRows] = {};
  for (int64_t i = 0; i < n; i++) {
    for (int64_t r = 0; r < rows; r++) {
      u[r] = up[r * ld + i] + (c.up_bias ? static_cast<float>(c.up_bias[e * S + r0 + r]) : 0.f);
      if (gate) g[r] = gate[r * ld + i] + (c.gate_bias ? static_cast<float>(c.gate_bias[e * S + r0 + r]) : 0.f);
    }
    if (up_pre) store(up_pre + (first + i) * S + r0, load(u), first_lanes(rows));
    if (up_pre && gate) store(gate_pre + (first + i) * S + r0, load(g), first_lanes(rows));
    const Vec value = gate ? activate<A>(Vec::loadu(g)) * Vec::loadu(u) : activate<A>(Vec::loadu(u));
    const float weight = c.weights ? c.weights[plan.slots[first + i]] : 1.f;
    store(h + (first + i) * S + r0, _mm512_mul_ps(value, _mm512_set1_ps(weight)), first_lanes(rows));
  }
}

constexpr int kOutputs = 8;  // output columns d computed together: they share the loads of h

// y[:, d .. d + ROWS - 1]: a row of down is a run of S values an expert; runs of experts nobody chose are skipped.
template <int ROWS, typename T>
void down_rows(const Call<T>& c, const Plan& plan, const T* h, int64_t d, int64_t end, T* y) {
  using dot = Dot<T>;
  thread_local Scratch accumulators, copies;
  const int64_t N = c.N, S = c.S;
  __m512* acc = accumulators.get<__m512>(N * ROWS);
  for (int64_t i = 0; i < N * ROWS; i++) acc[i] = _mm512_setzero_ps();

  for (const int64_t e : plan.chosen) {
    const Block<T> w(c.down, e, d, ROWS, 0, S, copies);
    const int64_t begin = plan.offsets[e], stop = plan.offsets[e + 1];
    const bool more = d + 2 * ROWS <= end;
    for (int64_t s = 0; s < S; s += dot::kWidth) {
      const int64_t width = std::min(dot::kWidth, S - s);
      typename dot::Register value[ROWS];
      for (int r = 0; r < ROWS; r++) {
        const T* at = w.data + r * w.ld + s;
        if (more) _mm_prefetch(reinterpret_cast<const char*>(at + ROWS * w.ld), _MM_HINT_T0);
        value[r] = width == dot::kWidth ? dot::load(at) : dot::load(at, width);
      }
      for (int64_t p = begin; p < stop; p++) {
        const T* from = h + p * S + s;
        const auto token = width == dot::kWidth ? dot::load(from) : dot::load(from, width);
        __m512* sum = acc + plan.tokens[p] * ROWS;
        for (int r = 0; r < ROWS; r++) sum[r] = dot::add(sum[r], value[r], token);
      }
    }
  }
  for (int64_t n = 0; n < N; n++) {
    for (int r = 0; r < ROWS; r++) {
      const float bias = c.down_bias ? static_cast<float>(c.down_bias[d + r]) : 0.f;
      y[n * c.D + d + r] = static_cast<T>(_mm512_reduce_add_ps(acc[n * ROWS + r]) + bias);
    }
  }
}

}  // namespace

template <typename T>
void forward_few(const Call<T>& c, const Plan& plan, Activation activation, T* y, T* up_pre, T* gate_pre) {
  const Tensor hidden = empty_bytes(plan.pairs() * c.S * int64_t(sizeof(T)));
  T* h = static_cast<T*>(hidden.data_ptr());
  const int64_t blocks = (c.S + kRows - 1) / kRows;

  // Contiguous shares, so that each thread reads memory in one direction.
  with_activation(activation, [&](auto which) {
    at::parallel_for(0, static_cast<int64_t>(plan.chosen.size()) * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t r0 = i % blocks * kRows;
        up_rows<which()>(c, plan, plan.chosen[i / blocks], r0, std::min(kRows, c.S - r0), h, up_pre, gate_pre);
      }
    });
  });
  at::parallel_for(0, (c.D + kOutputs - 1) / kOutputs, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kOutputs, c.D);
    int64_t d = begin * kOutputs;
    for (; d + kOutputs <= last; d += kOutputs) down_rows<kOutputs>(c, plan, h, d, last, y);
    for (; d < last; d++) down_rows<1>(c, plan, h, d, last, y);
  });
}

template void forward_few(const Call<float>&, const Plan&, Activation, float*, float*, float*);
template void forward_few(const Call<BFloat16>&, const Plan&, Activation, BFloat16*, BFloat16*, BFloat16*);

}  // namespace emoe
