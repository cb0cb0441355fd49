// The passes that ops.cpp puts together.
#pragma once

#include "activations.h"
#include "common.h"

namespace emoe {

// The arguments of one call, as pointers.
template <typename T>
struct Call {
  int64_t N, D, S, E;
  const T* x;  // (N, D), columns adjacent
  int64_t x_row;
  Weight<T> up, gate, down;  // (E, S, D), (E, S, D) or absent, (E, D, S)
  const T* up_bias;          // (E, S) or null, as the two that follow
  const T* gate_bias;
  const T* down_bias;    // (D)
  const float* weights;  // (N, K) or null
};

// y (N, D) is written whole; up_pre and gate_pre (R, S), if not null, take the pre-activations.
template <typename T>
void forward_grouped(const Call<T>& call, const Plan& plan, Activation activation, T* y, T* up_pre, T* gate_pre);

// The same results for few tokens an expert: dot products on the weights' natural rows, bounded by memory bandwidth.
template <typename T>
void forward_few(const Call<T>& call, const Plan& plan, Activation activation, T* y, T* up_pre, T* gate_pre);

// Tokens a chosen expert, on average, up to which dot products on the weights' natural rows beat GEMMs on 16 columns.
// Time of dot products over time of GEMMs, forward, AMD Zen 4, 2 threads, E 64, K 16, random routing, medians:
//   tokens an expert          2.2   4     8     12    16    24
//   D 2048, F 5632,  bf16    0.42  0.47  0.78  0.83  0.95  1.18
//   D 2048, F 5632,  fp32    0.46  0.56  0.79  1.17  1.28  1.51
//   D 576,  F 1536,  bf16    0.41  0.58  0.84  1.19  1.17  1.35
// A batch of which most tokens chose nobody is none of its business: it sums over all N tokens.
inline bool few_tokens(const Plan& plan, int64_t N) {
  return plan.pairs() <= 8 * int64_t(plan.chosen.size()) && N <= 4 * plan.pairs();
}

// What backward writes, whole (zeros for experts without pairs); null where nobody asked. The gradients of weights have
// any strides. Only `weights` must come in filled with zeros: unused slots are not visited.
template <typename T>
struct Gradients {
  T* x;  // (N, D) contiguous
  Weight<T> up, gate, down;
  T* up_bias;      // (E, S)
  T* gate_bias;    // (E, S)
  float* weights;  // (N, K)
};

// dy (N, D) contiguous; up_pre and gate_pre (R, S) as forward_grouped wrote them.
template <typename T>
void backward(const Call<T>& call, const Plan& plan, Activation activation, const T* dy, const T* up_pre,
              const T* gate_pre, const Gradients<T>& gradients);

}  // namespace emoe
