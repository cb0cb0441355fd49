// The operators that Python sees, torch.ops.emoe_cpu.*. Shapes and dtypes have been checked by experts/op.py; what is
// checked here is what only a look at the values tells (expert ids), and what would otherwise read foreign memory.
#include <torch/library.h>

#include "passes.h"

namespace emoe {

namespace {

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// Tensors that own what a Call points to.
struct Arguments {
  Tensor x, experts, up, down;
  OptionalTensor gate, up_bias, gate_bias, down_bias, weights;

  Arguments(const Tensor& x_ND, const Tensor& experts_NK, const Tensor& up_ESD, const Tensor& down_EDS,
            const OptionalTensor& gate_ESD, const OptionalTensor& up_bias_ES, const OptionalTensor& gate_bias_ES,
            const OptionalTensor& down_bias_D, const OptionalTensor& weights_NK)
      : x(x_ND.stride(1) == 1 ? x_ND : x_ND.contiguous()),
        experts(experts_NK),
        up(up_ESD),
        down(down_EDS),
        gate(gate_ESD),
        up_bias(contiguous(up_bias_ES)),
        gate_bias(contiguous(gate_bias_ES)),
        down_bias(contiguous(down_bias_D)),
        weights(weights_NK ? OptionalTensor(weights_NK->to(at::kFloat).contiguous()) : weights_NK) {
    TORCH_CHECK_VALUE(x.dim() == 2 && up.dim() == 3 && down.dim() == 3, "expected x (N, D), up (E, S, D), down (E, D, S)");
    TORCH_CHECK_VALUE(up.size(2) == x.size(1) && down.size(1) == x.size(1), "the weights do not fit x_ND");
  }

  template <typename T>
  Call<T> call() const {
    return {x.size(0),  x.size(1),       up.size(1),       up.size(0),        x.const_data_ptr<T>(),
            x.stride(0), Weight<T>(up), Weight<T>(gate), Weight<T>(down), pointer<T>(up_bias),
            pointer<T>(gate_bias), pointer<T>(down_bias), pointer<float>(weights)};
  }
};

template <typename F>
void with_dtype(at::ScalarType dtype, F&& f) {
  if (dtype == at::kFloat) return f(float{});
  TORCH_CHECK_VALUE(dtype == at::kBFloat16, "x_ND has dtype ", dtype, "; the CPU kernels take float32 and bfloat16");
  return f(BFloat16{});
}

Tensor forward(const Tensor& x, const Tensor& experts, const Tensor& up, const Tensor& down, const OptionalTensor& gate,
               const OptionalTensor& up_bias, const OptionalTensor& gate_bias, const OptionalTensor& down_bias,
               const OptionalTensor& weights, int64_t activation) {
  const Arguments arguments(x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights);
  const Plan plan = make_plan(experts, up.size(0));
  Tensor y = at::empty({x.size(0), x.size(1)}, x.options());
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto pass = few_tokens(plan) ? forward_few<T> : forward_grouped<T>;
    pass(arguments.call<T>(), plan, Activation(activation), y.mutable_data_ptr<T>(), nullptr, nullptr);
  });
  return y;
}

// As `forward`, and the pre-activations of up and gate (N * K, S): pair by pair in the order of the plan, rows of
// unused slots at the end left undefined.
std::tuple<Tensor, Tensor, Tensor> forward_keep(const Tensor& x, const Tensor& experts, const Tensor& up,
                                                const Tensor& down, const OptionalTensor& gate,
                                                const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
                                                const OptionalTensor& down_bias, const OptionalTensor& weights,
                                                int64_t activation) {
  const Arguments arguments(x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights);
  const Plan plan = make_plan(experts, up.size(0));
  Tensor y = at::empty({x.size(0), x.size(1)}, x.options());
  Tensor up_pre = at::empty({experts.numel(), up.size(1)}, x.options());
  Tensor gate_pre = at::empty({gate ? experts.numel() : 0, up.size(1)}, x.options());
  for (const Tensor& fresh : {y, up_pre, gate_pre}) advise_huge_pages(fresh);
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto pass = few_tokens(plan) ? forward_few<T> : forward_grouped<T>;
    pass(arguments.call<T>(), plan, Activation(activation), y.mutable_data_ptr<T>(), up_pre.mutable_data_ptr<T>(),
         gate_pre.mutable_data_ptr<T>());
  });
  return {y, up_pre, gate_pre};
}

// Writes into the gradients given, each of the shape of its argument; d_weights is fp32 and comes in filled with zeros.
void backward_into(const Tensor& dy, const Tensor& x, const Tensor& experts, const Tensor& up, const Tensor& down,
                   const OptionalTensor& gate, const OptionalTensor& weights, const Tensor& up_pre,
                   const Tensor& gate_pre, int64_t activation, const OptionalTensor& d_x, const OptionalTensor& d_up,
                   const OptionalTensor& d_down, const OptionalTensor& d_gate, const OptionalTensor& d_up_bias,
                   const OptionalTensor& d_gate_bias, const OptionalTensor& d_weights) {
  const Arguments arguments(x, experts, up, down, gate, {}, {}, {}, weights);
  const Plan plan = make_plan(experts, up.size(0));
  const Tensor grad = dy.contiguous();
  for (const OptionalTensor& fresh : {d_x, d_up, d_down, d_gate}) {
    if (fresh) advise_huge_pages(*fresh);
  }
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto at = [](const OptionalTensor& t) { return t ? t->mutable_data_ptr<T>() : nullptr; };
    const Gradients<T> gradients{at(d_x),       Weight<T>(d_up),   Weight<T>(d_gate), Weight<T>(d_down),
                                 at(d_up_bias), at(d_gate_bias),
                                 d_weights ? d_weights->mutable_data_ptr<float>() : nullptr};
    backward(arguments.call<T>(), plan, Activation(activation), grad.const_data_ptr<T>(),
             up_pre.const_data_ptr<T>(), gate_pre.const_data_ptr<T>(), gradients);
  });
}

}  // namespace

TORCH_LIBRARY(emoe_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor experts, Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, Tensor? gate_bias, "
      "Tensor? down_bias, Tensor? weights, int activation) -> Tensor");
  m.def(
      "forward_keep(Tensor x, Tensor experts, Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, "
      "Tensor? gate_bias, Tensor? down_bias, Tensor? weights, int activation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "backward_into(Tensor dy, Tensor x, Tensor experts, Tensor up, Tensor down, Tensor? gate, Tensor? weights, "
      "Tensor up_pre, Tensor gate_pre, int activation, Tensor(a!)? d_x, Tensor(b!)? d_up, Tensor(c!)? d_down, "
      "Tensor(d!)? d_gate, Tensor(e!)? d_up_bias, Tensor(f!)? d_gate_bias, Tensor(g!)? d_weights) -> ()");
}

TORCH_LIBRARY_IMPL(emoe_cpu, CPU, m) {
  m.impl("forward", forward);
  m.impl("forward_keep", forward_keep);
  m.impl("backward_into", backward_into);
}

}  // namespace emoe
