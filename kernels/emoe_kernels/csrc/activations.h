// The activations of emoe_kernels.experts, and their derivatives, on 16 fp32 lanes. The order of the names is
// the order of `_ACTIVATIONS` in experts/cpu.py.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>

#include "wide.h"

namespace emoe {

using Vec = at::vec::Vectorized<float>;
static_assert(Vec::size() == (kManyRegisters ? 16 : 8), "compile with -DCPU_CAPABILITY_AVX512 or _AVX2");

enum class Activation : int64_t { silu, gelu, gelu_tanh, quick_gelu, relu, relu_squared };

inline Vec sigmoid(Vec x) { return Vec(1.f) / (Vec(1.f) + x.neg().exp()); }

template <Activation A>
Vec activate_vec(Vec x) {
  if constexpr (A == Activation::silu) return x / (Vec(1.f) + x.neg().exp());
  if constexpr (A == Activation::gelu) return Vec(0.5f) * x * (Vec(1.f) + (x * Vec(float(M_SQRT1_2))).erf());
  if constexpr (A == Activation::gelu_tanh) {
    const Vec inner = Vec(float(M_SQRT2 * M_2_SQRTPI * 0.5)) * (x + Vec(0.044715f) * x * x * x);
    return Vec(0.5f) * x * (Vec(1.f) + inner.tanh());
  }
  if constexpr (A == Activation::quick_gelu) return x * sigmoid(Vec(1.702f) * x);
  // `maximum` keeps a NaN, as torch.relu does
  if constexpr (A == Activation::relu) return at::vec::maximum(x, Vec(0.f));
  if constexpr (A == Activation::relu_squared) {
    const Vec positive = at::vec::maximum(x, Vec(0.f));
    return positive * positive;
  }
}

template <Activation A>
Vec derivative_vec(Vec x) {
  if constexpr (A == Activation::silu) {
    const Vec s = sigmoid(x);
    return s * (Vec(1.f) + x * (Vec(1.f) - s));
  }
  if constexpr (A == Activation::gelu) {
    const Vec cdf = Vec(0.5f) * (Vec(1.f) + (x * Vec(float(M_SQRT1_2))).erf());
    const Vec pdf = (x * x * Vec(-0.5f)).exp() * Vec(float(M_2_SQRTPI * M_SQRT1_2 * 0.5));
    return cdf + x * pdf;
  }
  if constexpr (A == Activation::gelu_tanh) {
    const Vec beta(float(M_SQRT2 * M_2_SQRTPI * 0.5)), kappa(0.044715f);
    const Vec t = (beta * (x + kappa * x * x * x)).tanh();
    const Vec inner = beta * (Vec(1.f) + Vec(3.f) * kappa * x * x);
    return Vec(0.5f) * (Vec(1.f) + t) + Vec(0.5f) * x * (Vec(1.f) - t * t) * inner;
  }
  if constexpr (A == Activation::quick_gelu) {
    const Vec s = sigmoid(Vec(1.702f) * x);
    return s + Vec(1.702f) * x * s * (Vec(1.f) - s);
  }
  if constexpr (A == Activation::relu) return Vec::blendv(Vec(1.f), Vec(0.f), x <= Vec(0.f));  // 1 at NaN, as torch
  if constexpr (A == Activation::relu_squared) return Vec(2.f) * at::vec::maximum(x, Vec(0.f));
}

#ifdef __AVX512F__
template <Activation A>
Floats activate(Floats x) {
  return activate_vec<A>(Vec(x));
}
template <Activation A>
Floats derivative(Floats x) {
  return derivative_vec<A>(Vec(x));
}
#else
template <Activation A>
Floats activate(Floats x) {
  return {activate_vec<A>(Vec(x.low)), activate_vec<A>(Vec(x.high))};
}
template <Activation A>
Floats derivative(Floats x) {
  return {derivative_vec<A>(Vec(x.low)), derivative_vec<A>(Vec(x.high))};
}
#endif

// Calls f(std::integral_constant<Activation, A>) for the activation chosen at run time.
template <typename F>
void with_activation(Activation which, F&& f) {
  switch (which) {
    case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu: return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::quick_gelu: return f(std::integral_constant<Activation, Activation::quick_gelu>{});
    case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu_squared: return f(std::integral_constant<Activation, Activation::relu_squared>{});
  }
  TORCH_CHECK_VALUE(false, "activation ", int64_t(which), " is unknown");
}

}  // namespace emoe
