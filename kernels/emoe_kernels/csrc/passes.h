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
//   tokens an expert         1     2.2   4     6     8     16
//   D 576,  F 1536,  bf16   0.38  0.34  0.45  0.54  0.68  0.97
//   D 4096, F 11008, bf16   0.68  0.48  0.56  0.60  0.64  0.96
//   D 4096, F 11008, fp32   0.57  0.45  0.43  0.58  0.64  0.94
inline bool few_tokens(const Plan& plan) { return plan.pairs() <= 8 * int64_t(plan.chosen.size()); }

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
