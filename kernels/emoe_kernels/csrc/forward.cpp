// The forward pass with a GEMM an expert.
//
// Both GEMMs take the weights as they lie in the checkpoint as their left operand, so nothing of a weight is packed
// or copied; what is packed is the right operand, tokens in columns:
//   1. per (expert, up to 64 of its tokens): gather and transpose x, pre = W x^T for gate and up, h^T = act(..) * ..
//   2. per chunk of output columns: y^T_e = Wd h^T for every expert in turn, transposed and added to an accumulator
//      (N, chunk) in the L2 cache. No (N * K, D) buffer, no atomics, and a sum's order is always that of the experts.
#include "passes.h"

namespace emoe {

namespace {

constexpr int64_t kTokens = 64;  // of one expert, in one GEMM

template <typename T>
int64_t largest_chunk(int64_t D) {
  // the packed tokens should fit in half of an L2 cache
  return D * kTokens * int64_t(sizeof(T)) <= 512 * 1024 ? kTokens : kTokens / 2;
}

// pre (S, np) = W x^T for one expert.
template <typename T>
void project(const Weight<T>& weight, int64_t e, int64_t S, int64_t D, const T* x, int64_t np, float* pre) {
  thread_local Scratch copy;
  for (int64_t s = 0; s < S; s += kRowTile) {
    const int64_t rows = std::min(kRowTile, S - s);
    const Block<T> w(weight, e, s, rows, 0, D, copy);
    gemm<T>(rows, np, D, w.data, w.ld, x, np, pre + s * np, np, false);
  }
}

// In place: value (S, padded) += bias (S), per row.
template <typename T>
void add_bias(float* value, const T* bias, int64_t S, int64_t padded) {
  for (int64_t s = 0; s < S; s++) {
    const Floats b = all(static_cast<float>(bias[s]));
    for (int64_t j = 0; j < padded; j += kLanes) store(value + s * padded + j, add(load(value + s * padded + j), b));
  }
}

template <Activation A>
Floats hidden(const float* up, const float* gate, int64_t at, Floats weight) {
  return mul(gate ? mul(activate<A>(load(gate + at)), load(up + at)) : activate<A>(load(up + at)), weight);
}

// h^T (S, padded) as the right operand of the second GEMM.
template <Activation A, typename T>
void activate_chunk(const float* up, const float* gate, const float* weights, int64_t S, int64_t padded, T* packed) {
  for (int64_t s = 0; s < S; s += kPerDword<T>) {
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Floats w = load(weights + j);
      const Floats first = hidden<A>(up, gate, s * padded + j, w);
      if constexpr (kPerDword<T> == 1) {
        store(packed + s * padded + j, first);
      } else {
        const Floats second = hidden<A>(up, gate, (s + 1) * padded + j, w);
        store_dwords(reinterpret_cast<int32_t*>(packed + (s * padded + 2 * j)), interleave(to_bf16(first), to_bf16(second)));
      }
    }
  }
}

template <Activation A, typename T>
void up_chunk(const Call<T>& c, const Plan& plan, const Chunk& chunk, T* packed_h, T* up_pre, T* gate_pre) {
  thread_local Scratch packed_x, sums;
  const int64_t np = chunk.padded, S = c.S, D = c.D;

  const T* rows[kTokens];
  alignas(64) float weights[kTokens] = {};
  for (int64_t i = 0; i < chunk.count; i++) {
    rows[i] = c.x + plan.tokens[chunk.first + i] * c.x_row;
    weights[i] = c.weights ? c.weights[plan.slots[chunk.first + i]] : 1.f;
  }
  T* x = packed_x.get<T>(D * np);
  pack_transposed(rows, chunk.count, np, D, reinterpret_cast<int32_t*>(x));

  float* up = sums.get<float>(2 * S * np);
  float* gate = c.gate.data ? up + S * np : nullptr;
  project(c.up, chunk.expert, S, D, x, np, up);
  if (gate) project(c.gate, chunk.expert, S, D, x, np, gate);
  if (c.up_bias) add_bias(up, c.up_bias + chunk.expert * S, S, np);
  if (c.gate_bias) add_bias(gate, c.gate_bias + chunk.expert * S, S, np);
  if (up_pre) store_transposed(up, np, S, chunk.count, up_pre + chunk.first * S, S);
  if (up_pre && gate) store_transposed(gate, np, S, chunk.count, gate_pre + chunk.first * S, S);
  activate_chunk<A>(up, gate, weights, S, np, packed_h + chunk.start * S);
}

// sums (N, width)[token of column j] += part (width, padded)[:, j] for the `count` pairs of a chunk.
void add_transposed(const float* part, int64_t padded, int64_t width, const int32_t* tokens, int64_t count, float* sums) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const Lanes lanes = first_lanes(width - d);
    for (int64_t j = 0; j < count; j += kLanes) {
      Floats block[16];
      for (int64_t i = 0; i < kLanes; i++) {
        block[i] = d + i < width ? load(part + (d + i) * padded + j) : zeros();
      }
      transpose_16x16(block);
      const int64_t live = std::min(kLanes, count - j);
      for (int64_t i = 0; i < live; i++) {
        float* to = sums + tokens[j + i] * width + d;
        store(to, add(load(to, lanes), block[i]), lanes);
      }
    }
  }
}

template <typename T>
void down_columns(const Call<T>& c, const Plan& plan, const std::vector<Chunk>& chunks, const T* packed_h, int64_t d,
                  int64_t width, T* y) {
  thread_local Scratch accumulator, part, copy;
  const int64_t N = c.N, S = c.S;
  float* sums = accumulator.get<float>(N * width);
  for (int64_t n = 0; n < N; n++) {
    for (int64_t j = 0; j < width; j++) sums[n * width + j] = c.down_bias ? static_cast<float>(c.down_bias[d + j]) : 0.f;
  }
  float* product = part.get<float>(width * kTokens);
  for (const Chunk& chunk : chunks) {
    const Block<T> w(c.down, chunk.expert, d, width, 0, S, copy);
    gemm<T>(width, chunk.padded, S, w.data, w.ld, packed_h + chunk.start * S, chunk.padded, product, chunk.padded, false);
    add_transposed(product, chunk.padded, width, plan.tokens.data() + chunk.first, chunk.count, sums);
  }
  write_columns(sums, N, width, y, c.D, d);
}

}  // namespace

template <typename T>
void forward_grouped(const Call<T>& c, const Plan& plan, Activation activation, T* y, T* up_pre, T* gate_pre) {
  const std::vector<Chunk> chunks = make_chunks(plan, largest_chunk<T>(c.D));
  const int64_t columns = chunks.empty() ? 0 : chunks.back().start + chunks.back().padded;
  const Tensor hidden = empty_bytes(columns * c.S * int64_t(sizeof(T)));
  T* packed_h = static_cast<T*>(hidden.data_ptr());

  with_activation(activation, [&](auto which) {
    parallel_dynamic(chunks.size(), [&](int64_t i) {
      const GemmScope<T> scope;
      up_chunk<which()>(c, plan, chunks[i], packed_h, up_pre, gate_pre);
    });
  });
  const int64_t width = column_chunk(c.N, c.D);
  parallel_dynamic((c.D + width - 1) / width, [&](int64_t i) {
    const GemmScope<T> scope;
    down_columns(c, plan, chunks, packed_h, i * width, std::min(width, c.D - i * width), y);
  });
}

template void forward_grouped(const Call<float>&, const Plan&, Activation, float*, float*, float*);
template void forward_grouped(const Call<BFloat16>&, const Plan&, Activation, BFloat16*, BFloat16*, BFloat16*);

}  // namespace emoe
