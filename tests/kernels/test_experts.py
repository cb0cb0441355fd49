"""The sparse expert FFN against its equation: output and every gradient.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

import pytest
import torch
from support.dtypes import skip_without
from support.expert_ffn import BIASES, assert_same, error, make, run, run_with_grads, stack
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from emoe_kernels import use
from emoe_kernels.experts import ACTIVATIONS, expert_ffn

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


SHAPES = [  # N, D, F, E, K
    (33, 20, 48, 6, 2),  # the common case: nothing is a power of two
    (64, 32, 64, 8, 2),  # everything is
    (1, 16, 32, 8, 2),  # one token: rows of one, and the path for few tokens when no gradient is needed
    (16, 16, 32, 8, 3),  # the last N of that path
    (17, 16, 32, 8, 3),  # the first beyond it
    (3, 16, 64, 32, 2),  # more experts than pairs: most are empty
    (0, 16, 32, 8, 2),  # no tokens: empty output, zero gradients
    (20, 16, 32, 8, 8),  # K = E: dense
    (20, 16, 32, 8, 1),  # K = 1
    (20, 16, 32, 1, 1),  # one expert
    (20, 16, 8, 8, 3),  # S = 1: one neuron an expert
    (5, 1, 3, 3, 2),  # D = 1: columns of one
    (700, 8, 24, 6, 4),  # 2800 pairs: several groups of experts
    (1500, 4, 6, 3, 2),  # 1000 pairs an expert: groups of one expert
    (9, 12, 516, 3, 2),  # 172 neurons an expert, as in Llama 7B with 64: not a multiple of 16 bytes in bf16
]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(fast, shape, gated):
    args = make(*shape, gated=gated)
    expected = run_with_grads("reference", args)
    assert_same(run_with_grads(fast, args), expected, 1e-5)
    assert error(run(fast, args), expected["y"]) <= 1e-5


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "ones"])
@pytest.mark.parametrize("biases", [(), *((b,) for b in BIASES), BIASES], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_each_bias_with_and_without_weights(fast, gated, biases, weighted):
    args = make(18, 12, 30, 5, 2, gated=gated, biases=biases, weighted=weighted)
    expected = run_with_grads("reference", args)
    assert_same(run_with_grads(fast, args), expected, 1e-5)
    assert error(run(fast, args), expected["y"]) <= 1e-5
    few = {k: args[k][:4] if args[k] is not None else None for k in ("x_ND", "experts_NK", "weights_NK")}
    assert error(run(fast, args, **few), expected["y"][:4]) <= 1e-5


def _rows(x):
    """The same values as a view of every second row of a larger matrix."""
    return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]


LAYOUTS = {
    "GPT-2 Conv1D: both transposed": {k: lambda w: w.t().contiguous().t() for k in ("up_FD", "down_DF", "gate_FD")},
    "chunks of a fused gate_up matrix": {
        "up_FD": lambda w: torch.cat([torch.full_like(w, torch.nan), w])[len(w) :],
        "gate_FD": lambda w: torch.cat([w, torch.full_like(w, torch.nan)])[: len(w)],
    },
    "columns of a fused matrix": {"up_FD": lambda w: torch.cat([w, w.new_full((len(w), 3), torch.nan)], 1)[:, :-3]},
    "x with strides": {"x_ND": _rows, "experts_NK": lambda t: t.t().contiguous().t(), "weights_NK": _rows},
    "x transposed": {"x_ND": lambda x: x.t().contiguous().t()},
    "x expanded": {"x_ND": lambda x: x[:1].expand_as(x)},
}


@pytest.mark.parametrize("N", [5, 40])
@pytest.mark.parametrize("name", LAYOUTS)
def test_strided_views(fast, name, N):
    args = make(N, 24, 40, 5, 2)
    strided = args | {k: view(args[k]) for k, view in LAYOUTS[name].items()}
    assert not all(strided[k].is_contiguous() for k in LAYOUTS[name]) or "chunks" in name
    expected = run_with_grads("reference", {k: v.contiguous() if torch.is_tensor(v) else v for k, v in strided.items()})
    assert_same(run_with_grads(fast, strided), expected, 1e-5)
    assert error(run(fast, strided), expected["y"]) <= 1e-5


STACKED = {
    "contiguous": {},
    "transposed, as GPT-OSS": {
        "view_rows": lambda w: w.mT.contiguous().mT,
        "view_columns": lambda w: w.mT.contiguous().mT,
    },
    "halves of gate_up_proj": {"view_rows": lambda w: torch.cat([torch.full_like(w, torch.nan), w], 1)[:, len(w[0]) :]},
    "every second expert": {"view_columns": lambda w: torch.stack([w, torch.full_like(w, torch.nan)], 1)[:, 0]},
}


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("N", [5, 40, 0])
@pytest.mark.parametrize("layout", STACKED)
def test_stacked_weights(fast, layout, N, gated):
    args = make(N, 24, 40, 5, 2, gated=gated)
    stacked = stack(args, **STACKED[layout])
    expected = run_with_grads("reference", args)
    actual = run_with_grads(fast, stacked)
    assert_same(run_with_grads("reference", stacked), actual, 1e-5)
    assert error(run(fast, stacked), expected["y"]) <= 1e-5
    for name in ("up_FD", "gate_FD", "up_bias_F", "gate_bias_F"):
        if args[name] is not None:
            actual[f"d {name}"] = actual[f"d {name}"].flatten(0, 1)
    actual["d down_DF"] = actual["d down_DF"].transpose(0, 1).flatten(1)
    assert_same(actual, expected, 1e-5)


class Copies(TorchDispatchMode):
    """Notes operations that write a tensor of at least `size` elements without computing anything new."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copying = any(word in str(func) for word in ("clone", "copy", "contiguous", "cat", "stack", "zeros"))
        if copying and torch.is_tensor(out) and out.numel() >= self.size:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_gradients_of_dense_weights_are_not_copied(fast, transposed):
    """They are written in the strides of the stacked views, so the way back to (F, D) is a view too."""
    args = make(40, 24, 40 * 24, 8, 2)
    names = ("up_FD", "gate_FD", "down_DF")
    leaves = {k: args[k].t().contiguous() if transposed else args[k] for k in names}
    leaves = {k: w.requires_grad_() for k, w in leaves.items()}
    views = {k: w.t() if transposed else w for k, w in leaves.items()}
    with use(fast):
        y = expert_ffn(**(args | views))
    with Copies(args["up_FD"].numel()) as copies:
        y.sum().backward()
    assert copies.seen == []
    for leaf in leaves.values():
        assert leaf.grad.stride() == leaf.stride()


@pytest.mark.parametrize("N", [6, 40])
def test_unused_slots_vary_the_number_of_experts(fast, N):
    args = make(N, 12, 24, 6, 3)
    experts_NK = args["experts_NK"]
    experts_NK[0] = -1  # a token without experts gets the output bias alone
    experts_NK[1, 0] = experts_NK[2, 1] = experts_NK[3, 2] = experts_NK[4, :2] = -1
    expected = run_with_grads("reference", args)
    actual = run_with_grads(fast, args)
    assert_same(actual, expected, 1e-5)
    for y in (actual["y"], run(fast, args)):
        assert error(y, expected["y"]) <= 1e-5
        assert torch.equal(y[0], args["down_bias_D"])
    assert not actual["d weights_NK"][experts_NK == -1].any()

    experts_NK.fill_(-1)  # nobody chooses anything
    assert_same(run_with_grads(fast, args), run_with_grads("reference", args), 1e-5)
    assert torch.equal(run(fast, args), args["down_bias_D"].expand(N, -1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_activations(fast, activation, gated):
    args = make(40, 12, 24, 6, 3, gated=gated) | {"activation": activation}
    assert_same(run_with_grads(fast, args), run_with_grads("reference", args), 1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "quick_gelu"])
def test_gradcheck(activation):
    args = make(4, 3, 6, 3, 2, dtype=torch.float64)
    args["experts_NK"][0, 1] = -1
    names = [k for k, v in args.items() if torch.is_tensor(v) and v.is_floating_point()]
    leaves = tuple(args[k].requires_grad_() for k in names)

    def f(*values):
        with use("portable"):
            return expert_ffn(**(args | dict(zip(names, values, strict=True))), activation=activation)

    assert torch.autograd.gradcheck(f, leaves)


def test_only_what_is_asked_for_gets_a_gradient(fast):
    args = make(20, 12, 24, 6, 3)
    full = run_with_grads(fast, args)
    for name in (k[2:] for k in full if k != "y"):
        leaf = args[name].detach().requires_grad_()
        with use(fast):
            y = expert_ffn(**(args | {name: leaf}))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], full[f"d {name}"]), name


BF16_SHAPES = [  # N, E, K; D = 64, F = 256
    (8, 16, 4),  # the path for few tokens
    (96, 16, 4),
    (96, 32, 24),  # sums over many experts: parts added in bf16 instead of fp32 would fail
]


@pytest.mark.parametrize("N, E, K", BF16_SHAPES)
def test_bf16_is_as_exact_as_a_dense_layer(fast, N, E, K):
    """Against fp32 on the same bf16 values: the errors of the dense bf16 layer are the yardstick, not a constant.

    The dense layer is all experts with weight 1 in plain torch; the sparse one sums K of E experts, rounds each
    expert's part to bf16 and adds the parts in fp32. 1.25: a gradient with few tokens an expert is a sum of fewer
    terms than the dense one, and its error scatters; the largest ratio seen is 1.15.
    """
    skip_without(fast, torch.bfloat16)
    args = make(N, 64, 256, E, K, dtype=torch.bfloat16)
    exact = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in args.items()}
    expected, actual = run_with_grads("reference", exact), run_with_grads(fast, args)

    names = [k for k in args if k not in ("experts_NK", "weights_NK", "num_experts")]

    def dense(values):
        leaves = {k: values[k].detach().requires_grad_() for k in names}
        x, up, down, gate, bu, bg, bd = leaves.values()
        y = linear(torch.nn.functional.silu(linear(x, gate, bg)) * linear(x, up, bu), down, bd)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
        return {"y": y.detach()} | dict(
            zip((f"d {k}" for k in names), torch.autograd.grad(y, [*leaves.values()], dy), strict=True)
        )

    exact_dense, rounded_dense = dense(exact), dense(args)
    bound = {k: error(rounded_dense[k], exact_dense[k]) for k in exact_dense}
    bound["d weights_NK"] = bound["d x_ND"]  # the dense layer has none; it too is two GEMMs away from dy
    for name in expected:
        assert actual[name].dtype == torch.bfloat16
        assert error(actual[name], expected[name]) <= 1.25 * bound[name], name
    assert error(run(fast, args), expected["y"]) <= 1.25 * bound["y"]


def test_router_weights_may_stay_fp32(fast):
    skip_without(fast, torch.bfloat16)
    args = make(40, 24, 40, 5, 2, dtype=torch.bfloat16)
    args["weights_NK"] = args["weights_NK"].float() + 1e-4
    actual, expected = run_with_grads(fast, args), run_with_grads("reference", args)
    assert_same(actual, expected, 2e-2)
    assert actual["y"].dtype == torch.bfloat16 and actual["d weights_NK"].dtype == torch.float32
