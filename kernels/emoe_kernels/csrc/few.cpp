// The forward pass for few tokens an expert: generation, mostly.
//
// Every chosen row of a weight is read once from memory, in the checkpoint's layout, and multiplied with the tokens
// that chose its expert; the tokens stay in the L1 cache. Rows further on are prefetched by hand, because a row of
// an expert ends before the hardware prefetcher has caught up with it.
#include "dots.h"
#include "passes.h"

namespace emoe {

namespace {

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
    const Floats value = gate ? mul(activate<A>(load(g)), load(u)) : activate<A>(load(u));
    const float weight = c.weights ? c.weights[plan.slots[first + i]] : 1.f;
    store(h + (first + i) * S + r0, mul(value, all(weight)), first_lanes(rows));
  }
}

constexpr int kOutputs = kManyRegisters ? 8 : 4;  // output columns d computed together: they share the loads of h

// acc (N, ld)[token of pair p][0 .. ROWS - 1] += rows of down . h[p], for the pairs of one expert.
template <int ROWS, typename T>
void add_dots(const T* w, int64_t w_ld, const Plan& plan, int64_t e, const T* h, int64_t S, bool more, Floats* acc,
              int64_t ld) {
  using dot = Dot<T>;
  const int64_t begin = plan.offsets[e], stop = plan.offsets[e + 1];
  for (int64_t s = 0; s < S; s += dot::kWidth) {
    const int64_t width = std::min(dot::kWidth, S - s);
    typename dot::Register value[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const T* at = w + r * w_ld + s;
      if (more) _mm_prefetch(reinterpret_cast<const char*>(at + ROWS * w_ld), _MM_HINT_T0);
      value[r] = width == dot::kWidth ? dot::load(at) : dot::load(at, width);
    }
    for (int64_t p = begin; p < stop; p++) {
      const T* from = h + p * S + s;
      const auto token = width == dot::kWidth ? dot::load(from) : dot::load(from, width);
      Floats* sum = acc + plan.tokens[p] * ld;
      for (int r = 0; r < ROWS; r++) sum[r] = dot::add(sum[r], value[r], token);
    }
  }
}

// y[:, d .. d + rows - 1]: a row of down is a run of S values an expert; runs of experts nobody chose are skipped.
template <typename T>
void down_rows(const Call<T>& c, const Plan& plan, const T* h, int64_t d, int64_t rows, bool more, T* y) {
  thread_local Scratch accumulators, copies;
  const int64_t N = c.N;
  Floats* acc = accumulators.get<Floats>(N * rows);
  for (int64_t i = 0; i < N * rows; i++) acc[i] = zeros();

  for (const int64_t e : plan.chosen) {
    const Block<T> w(c.down, e, d, rows, 0, c.S, copies);
    int64_t r = 0;
    for (; r + kOutputs <= rows; r += kOutputs) {
      add_dots<kOutputs>(w.data + r * w.ld, w.ld, plan, e, h, c.S, more, acc + r, rows);
    }
    for (; r < rows; r++) add_dots<1>(w.data + r * w.ld, w.ld, plan, e, h, c.S, more, acc + r, rows);
  }
  for (int64_t n = 0; n < N; n++) {
    for (int64_t r = 0; r < rows; r++) {
      const float bias = c.down_bias ? static_cast<float>(c.down_bias[d + r]) : 0.f;
      y[n * c.D + d + r] = static_cast<T>(sum_lanes(acc[n * rows + r]) + bias);
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
  // Rows that are copied, of a weight stored transposed, are copied by whole vectors.
  const int64_t group = c.down.col == 1 ? kOutputs : kLanes;
  at::parallel_for(0, (c.D + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * group, c.D);
    for (int64_t d = begin * group; d < last; d += group) {
      const bool more = c.down.col == 1 && d + 2 * group <= last;
      down_rows(c, plan, h, d, std::min(group, last - d), more, y);
    }
  });
}

template void forward_few(const Call<float>&, const Plan&, Activation, float*, float*, float*);
template void forward_few(const Call<BFloat16>&, const Plan&, Activation, BFloat16*, BFloat16*, BFloat16*);

}  // namespace emoe
