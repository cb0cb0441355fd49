// The operators of stick-breaking attention, torch.ops.emoe_cpu.stick_breaking*. stickbreaking/op.py has checked the
// arguments with friendlier words; here everything is checked that would otherwise read or write foreign memory.
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "sticks.h"

namespace emoe {

namespace {

constexpr int64_t kParts = 8;  // of the backward pass at least, if there are as many tiles of rows

Tensor adjacent(const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

// Tensors that own what a call points to.
struct Arguments {
  Tensor q, k, v;
  OptionalTensor key_mask;
  bool attend_current;
  double scale;

  Arguments(const Tensor& q_BHTA, const Tensor& k_BGLA, const Tensor& v_BGLA, const OptionalTensor& key_mask_BL,
            bool attend_current, double scale)
      : q(adjacent(q_BHTA)),
        k(adjacent(k_BGLA)),
        v(adjacent(v_BGLA)),
        key_mask(key_mask_BL ? OptionalTensor(key_mask_BL->contiguous()) : key_mask_BL),
        attend_current(attend_current),
        scale(scale) {
    TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "expected q (B, H, T, A), k (B, G, L, A)");
    const int64_t B = q.size(0), H = q.size(1), A = q.size(3), G = k.size(1), L = k.size(2);
    TORCH_CHECK_VALUE(G > 0 && H % G == 0 && q.size(2) <= L, "expected H a multiple of G, and T <= L");
    TORCH_CHECK_VALUE(L <= INT32_MAX - kKeys, "L=", L, " does not fit into 32 bits");
    TORCH_CHECK_VALUE(A > 0 && A % (q.scalar_type() == at::kBFloat16 ? 2 : 1) == 0, "bfloat16 needs an even A");
    const std::vector<int64_t> shape{B, G, L, A};
    TORCH_CHECK_VALUE(k.sizes() == shape && v.sizes() == shape, "k and v have shapes ", k.sizes(), " and ", v.sizes(),
                      "; expected ", shape);
    TORCH_CHECK_VALUE(!key_mask || (key_mask->sizes() == at::IntArrayRef{B, L} && key_mask->scalar_type() == at::kBool),
                      "key_mask is not a bool of shape (", B, ", ", L, ")");
  }

  template <typename T>
  Sticks<T> call() const {
    return {q.size(0),
            q.size(1),
            k.size(1),
            q.size(2),
            k.size(2),
            q.size(3),
            Heads<T>(q),
            Heads<T>(k),
            Heads<T>(v),
            key_mask ? key_mask->const_data_ptr<bool>() : nullptr,
            attend_current,
            static_cast<float>(scale)};
  }
};

template <typename F>
void with_dtype(at::ScalarType dtype, F&& f) {
  if (dtype == at::kFloat) return f(float{});
  TORCH_CHECK_VALUE(dtype == at::kBFloat16, "q has dtype ", dtype, "; the CPU kernels take float32 and bfloat16");
  return f(BFloat16{});
}

std::tuple<Tensor, Tensor> stick_breaking(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
                                          bool attend_current, double scale) {
  const Arguments arguments(q, k, v, key_mask, attend_current, scale);
  Tensor y = at::empty(q.sizes(), q.options()), remainder = at::empty(q.sizes().slice(0, 3), q.options());
  with_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Sticks<T> call = arguments.call<T>();
    const auto pass = call.rows() <= kFewRows ? sticks_forward_few<T> : sticks_forward<T>;
    if (y.numel()) pass(call, y.mutable_data_ptr<T>(), remainder.mutable_data_ptr<T>());
  });
  return {y, remainder};
}

std::tuple<Tensor, Tensor, Tensor> stick_breaking_backward(const Tensor& dy, const OptionalTensor& d_remainder,
                                                           const Tensor& q, const Tensor& k, const Tensor& v,
                                                           const OptionalTensor& key_mask, bool attend_current,
                                                           double scale) {
  const Arguments arguments(q, k, v, key_mask, attend_current, scale);
  TORCH_CHECK_VALUE(dy.sizes() == q.sizes() && dy.scalar_type() == q.scalar_type(), "dy does not fit q");
  TORCH_CHECK_VALUE(!d_remainder || d_remainder->sizes() == q.sizes().slice(0, 3), "d_remainder does not fit q");
  const Tensor grad = adjacent(dy);
  const OptionalTensor grad_remainder = d_remainder ? OptionalTensor(d_remainder->contiguous()) : d_remainder;
  Tensor dq = at::empty(q.sizes(), q.options()), dkv;
  with_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Sticks<T> call = arguments.call<T>();
    const int64_t heads = call.B * call.G, row_tiles = (call.rows() + kTileRows - 1) / kTileRows;
    const int64_t chunks = std::clamp<int64_t>(kParts / std::max<int64_t>(heads, 1), 1, std::max<int64_t>(row_tiles, 1));
    dkv = at::zeros({2, heads, chunks, call.key_tiles() * kKeys, call.A}, q.options().dtype(at::kFloat));
    const T* d_left = grad_remainder ? grad_remainder->const_data_ptr<T>() : nullptr;
    if (dq.numel()) {
      sticks_backward(call, Heads<T>(grad), d_left, dq.mutable_data_ptr<T>(), dkv.mutable_data_ptr<float>(), chunks);
    }
  });
  dkv = (dkv.size(2) == 1 ? dkv.squeeze(2) : dkv.sum(2)).narrow(2, 0, k.size(2)).to(q.scalar_type());
  return {dq, dkv[0].reshape(k.sizes()), dkv[1].reshape(k.sizes())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(emoe_cpu, m) {
  m.def(
      "stick_breaking(Tensor q, Tensor k, Tensor v, Tensor? key_mask, bool attend_current, float scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "stick_breaking_backward(Tensor dy, Tensor? d_remainder, Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
      "bool attend_current, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(emoe_cpu, CPU, m) {
  m.impl("stick_breaking", stick_breaking);
  m.impl("stick_breaking_backward", stick_breaking_backward);
}

// stickbreaking/cpu.py differentiates. Whoever differentiates the operators directly gets an error and not zeros.
TORCH_LIBRARY_IMPL(emoe_cpu, AutogradCPU, m) {
  m.impl("stick_breaking", torch::autograd::autogradNotImplementedFallback());
  m.impl("stick_breaking_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace emoe
