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

// The same result for few tokens an expert: dot products on the weights' natural rows, bounded by memory bandwidth.
template <typename T>
void forward_few(const Call<T>& call, const Plan& plan, Activation activation, T* y);

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
