// The operators that Python sees, torch.ops.emoe_cpu.*. experts/op.py has checked the arguments with friendlier words;
// here everything is checked that would otherwise read or write foreign memory.
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "passes.h"

namespace emoe {

namespace {

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// Throws if t does not fit what is computed. Dtypes of what is read through data_ptr<T> are checked there.
void check(const char* name, const OptionalTensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(!t || t->sizes() == shape, name, " has shape ", t ? t->sizes() : shape, "; expected ", shape);
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
    TORCH_CHECK_VALUE(x.dim() == 2 && up.dim() == 3 && experts.dim() == 2, "expected x (N, D), up (E, S, D)");
    const int64_t N = x.size(0), D = x.size(1), E = up.size(0), S = up.size(1);
    TORCH_CHECK_VALUE(S > 0 && D > 0, "S and D must not be zero");
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || (S % 2 == 0 && D % 2 == 0), "bfloat16 needs even S and D");
    check("experts_NK", experts, {N, experts.size(1)});
    check("up_ESD", up, {E, S, D});
    check("down_EDS", down, {E, D, S});
    check("gate_ESD", gate, {E, S, D});
    check("up_bias_ES", up_bias, {E, S});
    check("gate_bias_ES", gate_bias, {E, S});
    check("down_bias_D", down_bias, {D});
    check("weights_NK", weights, experts.sizes());
  }

  template <typename T>
  Call<T> call() const {
    return {x.size(0),
            x.size(1),
            up.size(1),
            up.size(0),
            x.const_data_ptr<T>(),
            x.stride(0),
            Weight<T>::read(up),
            Weight<T>::read(gate),
            Weight<T>::read(down),
            pointer<T>(up_bias),
            pointer<T>(gate_bias),
            pointer<T>(down_bias),
            pointer<float>(weights)};
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
    const auto pass = few_tokens(plan, x.size(0)) ? forward_few<T> : forward_grouped<T>;
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
    const auto pass = few_tokens(plan, x.size(0)) ? forward_few<T> : forward_grouped<T>;
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
  const int64_t pairs = experts.numel(), S = up.size(1);
  check("dy", dy, x.sizes());
  check("up_pre", up_pre, {pairs, S});
  check("gate_pre", gate_pre, {gate ? pairs : 0, S});
  check("d_x", d_x, x.sizes());
  check("d_up", d_up, up.sizes());
  check("d_down", d_down, down.sizes());
  check("d_gate", d_gate, up.sizes());
  check("d_up_bias", d_up_bias, {up.size(0), S});
  check("d_gate_bias", d_gate_bias, {up.size(0), S});
  check("d_weights", d_weights, experts.sizes());
  for (const OptionalTensor& t : {d_x, d_up_bias, d_gate_bias, d_weights}) {
    TORCH_CHECK_VALUE(!t || t->is_contiguous(), "gradients of x, biases and routing weights must be contiguous");
  }
  const Tensor grad = dy.contiguous();
  for (const OptionalTensor& fresh : {d_x, d_up, d_down, d_gate}) {
    if (fresh) advise_huge_pages(*fresh);
  }
  with_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto at = [](const OptionalTensor& t) { return t ? t->mutable_data_ptr<T>() : nullptr; };
    const Gradients<T> gradients{at(d_x),
                                 Weight<T>::write(d_up),
                                 Weight<T>::write(d_gate),
                                 Weight<T>::write(d_down),
                                 at(d_up_bias),
                                 at(d_gate_bias),
                                 d_weights ? d_weights->mutable_data_ptr<float>() : nullptr};
    backward(arguments.call<T>(), plan, Activation(activation), grad.const_data_ptr<T>(),
             up_pre.const_data_ptr<T>(), gate_pre.const_data_ptr<T>(), gradients);
  });
}

// experts/cpu.py differentiates. Whoever differentiates the operators directly, in forward mode too, gets an error and not
// zeros. (torch's own fallback does this as well, and takes 5 us, a tenth of a small layer.)
constexpr char kForward[] = "emoe_cpu::forward", kForwardKeep[] = "emoe_cpu::forward_keep";

template <const char* name, auto function>
auto undifferentiated(const Tensor& x, const Tensor& experts, const Tensor& up, const Tensor& down,
                      const OptionalTensor& gate, const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
                      const OptionalTensor& down_bias, const OptionalTensor& weights, int64_t activation) {
  for (const OptionalTensor& t : {OptionalTensor(x), OptionalTensor(up), OptionalTensor(down), gate, up_bias, gate_bias,
                                  down_bias, weights}) {
    const bool backward = at::GradMode::is_enabled() && t && t->requires_grad();
    TORCH_CHECK_NOT_IMPLEMENTED(!backward && !torch::autograd::isFwGradDefined(t),
                                "torch.ops.emoe_cpu has no derivatives: use emoe_kernels.experts.expert_ffn, "
                                "which has first derivatives in reverse mode");
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<std::remove_pointer_t<decltype(function)>>();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights, activation);
}

// Whether oneDNN generates kernels for this dtype on this processor: for bf16 it wants avx512_bf16 or AMX, and any of it
// may have been switched off (ONEDNN_MAX_CPU_ISA).
bool can_multiply(at::ScalarType dtype) {
  const Tensor a = at::ones({16, 16}, at::kFloat).to(dtype), c = at::empty({16, 16}, at::kFloat);
  try {
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* values = a.const_data_ptr<T>();
      gemm<T>(16, 16, 16, values, 16, values, 16, c.mutable_data_ptr<float>(), 16, false);
      const GemmScope<T> scope;
    });
  } catch (const std::exception&) {
    return false;
  }
  return c.eq(16).all().item<bool>();
}

}  // namespace

TORCH_LIBRARY(emoe_cpu, m) {
  m.def("can_multiply(ScalarType dtype) -> bool", can_multiply);
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

TORCH_LIBRARY_IMPL(emoe_cpu, AutogradCPU, m) {
  m.impl("forward", undifferentiated<kForward, forward>);
  m.impl("forward_keep", undifferentiated<kForwardKeep, forward_keep>);
}

}  // namespace emoe
