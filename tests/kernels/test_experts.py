"""The sparse expert FFN against its equation: output, every gradient, and the laws it obeys.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from emoe_kernels import extension, use
from emoe_kernels.experts import ACTIVATIONS, expert_ffn, portable

FAST = ("portable", "cpu") if extension.status().available else ("portable",)
BIASES = ("up_bias_F", "gate_bias_F", "down_bias_D")


def choose(N, E, K, generator):
    return torch.rand(N, E, generator=generator).argsort(1)[:, :K]


def make(N, D, F, E, K, *, gated=True, biases=BIASES, weighted=True, dtype=torch.float32, seed=0):
    """Arguments of `expert_ffn`, scaled so that pre-activations and outputs are about 1."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    args = {
        "x_ND": randn(N, D),
        "experts_NK": choose(N, E, K, g),
        "up_FD": randn(F, D) / D**0.5,
        "down_DF": randn(D, F) / F**0.5,
        "gate_FD": randn(F, D) / D**0.5 if gated else None,
        "up_bias_F": randn(F),
        "gate_bias_F": randn(F) if gated else None,
        "down_bias_D": randn(D),
        "weights_NK": randn(N, K).abs() if weighted else None,
    }
    args.update({name: None for name in BIASES if name not in biases})
    args = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in args.items()}
    return args | {"num_experts": E}


def run(implementation, args, **changes):
    with use(implementation), torch.no_grad():
        return expert_ffn(**(args | changes))


def run_with_grads(implementation, args, **changes):
    """y and the gradient of every floating argument, for a fixed random dy."""
    args = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in (args | changes).items()}
    leaves = {k: v.requires_grad_() for k, v in args.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    with use(implementation):
        y = expert_ffn(**args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}


def error(actual, expected):
    """Norm of the difference over norm of the expected."""
    assert actual.shape == expected.shape
    difference, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert error(actual[name], expected[name]) <= tolerance, name  # also fails on NaN


@pytest.fixture(params=FAST)
def fast(request):
    """The name of an implementation that computes the chosen experts only."""
    return request.param


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty gives NaN, so that a row which no expert wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


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


def stack(args, view_rows=lambda w: w, view_columns=lambda w: w):
    """The same arguments with stacked weights, contiguous unless a view says otherwise."""
    E = args["num_experts"]
    stacked = {k: v for k, v in args.items() if k != "num_experts"}
    for name in ("up_FD", "gate_FD", "up_bias_F", "gate_bias_F"):
        if args[name] is not None:
            stacked[name] = args[name].unflatten(0, (E, -1)).contiguous()
    for name in ("up_FD", "gate_FD"):
        if args[name] is not None:
            stacked[name] = view_rows(stacked[name])
    return stacked | {"down_DF": view_columns(args["down_DF"].unflatten(1, (E, -1)).transpose(0, 1).contiguous())}


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
    args = make(40, 24, 40, 5, 2, dtype=torch.bfloat16)
    args["weights_NK"] = args["weights_NK"].float() + 1e-4
    actual, expected = run_with_grads(fast, args), run_with_grads("reference", args)
    assert_same(actual, expected, 2e-2)
    assert actual["y"].dtype == torch.bfloat16 and actual["d weights_NK"].dtype == torch.float32


# Laws


@pytest.mark.parametrize("N", [5, 50])
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_all_experts_are_the_dense_layer(implementation, N):
    a = make(N, 20, 48, 6, 6, weighted=False)
    h = torch.nn.functional.silu(linear(a["x_ND"], a["gate_FD"], a["gate_bias_F"]))
    dense = linear(h * linear(a["x_ND"], a["up_FD"], a["up_bias_F"]), a["down_DF"], a["down_bias_D"])
    assert error(run(implementation, a), dense) <= 1e-5


def test_a_token_does_not_depend_on_its_batch_mates(fast):
    args = make(40, 20, 48, 6, 2)
    y = run(fast, args)
    for n in (0, 17, 39):
        alone = {k: args[k][n : n + 1] for k in ("x_ND", "experts_NK", "weights_NK")}
        assert error(run(fast, args, **alone), y[n : n + 1]) <= 1e-5


@pytest.mark.parametrize("N", [6, 40])
def test_order_of_experts_and_of_slots_changes_nothing(fast, N):
    E = 6
    args = make(N, 20, 48, E, 3)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(2))
    permuted = dict(args)
    for name, dim in (("up_FD", 0), ("gate_FD", 0), ("up_bias_F", 0), ("gate_bias_F", 0), ("down_DF", 1)):
        permuted[name] = args[name].unflatten(dim, (E, -1)).index_select(dim, order).flatten(dim, dim + 1)
    permuted["experts_NK"] = order.argsort()[args["experts_NK"]]  # where the expert went
    assert error(run(fast, permuted), run(fast, args)) <= 1e-6

    flipped = {k: args[k].flip(1) for k in ("experts_NK", "weights_NK")}
    assert torch.equal(run(fast, args, **flipped), run(fast, args))


@pytest.mark.parametrize("N", [6, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_token_stays_alone(fast, N, bad):
    args = make(N, 20, 48, 6, 3)
    clean = run(fast, args), run_with_grads(fast, args)
    args["x_ND"][2, 3] = bad
    dirty = run(fast, args), run_with_grads(fast, args)
    others = torch.arange(N) != 2
    for y_clean, y_dirty in ((clean[0], dirty[0]), (clean[1]["y"], dirty[1]["y"])):
        assert torch.equal(y_dirty[others], y_clean[others])
        assert not y_dirty[2].isfinite().all()
    for name in ("d x_ND", "d weights_NK"):
        assert torch.equal(dirty[1][name][others], clean[1][name][others])


@pytest.mark.parametrize("N", [6, 40])
def test_an_overflowing_expert_reaches_only_those_who_chose_it(fast, N):
    args = make(N, 20, 48, 6, 2)
    args["experts_NK"] %= 5
    args["experts_NK"][:, 1] = (args["experts_NK"][:, 0] + 1) % 5
    args["experts_NK"][3, 1] = 5
    clean = run(fast, args)
    args["up_FD"][40:] *= 1e30
    args["gate_FD"][40:] *= 1e30  # the hidden values of expert 5 are infinite for about every token
    y = run(fast, args)
    others = torch.arange(N) != 3
    assert torch.equal(y[others], clean[others])
    assert not y[3].isfinite().all()


@pytest.mark.parametrize("N", [6, 40])
def test_experts_nobody_chose_are_never_read(fast, N):
    E = 8
    args = make(N, 20, 48, E, 2)
    args["experts_NK"] %= 4
    args["experts_NK"][:, 1] = (args["experts_NK"][:, 0] + 1) % 4  # 4 to 7 are nobody's
    expected = run_with_grads("reference", args)
    for name in ("up_FD", "gate_FD", "up_bias_F", "gate_bias_F"):
        args[name][24:] = torch.nan
    args["down_DF"][:, 24:] = torch.nan
    assert error(run(fast, args), expected["y"]) <= 1e-5
    actual = run_with_grads(fast, args)
    assert_same(actual, expected, 1e-5)
    for name in ("up_FD", "gate_FD", "up_bias_F", "gate_bias_F"):
        assert (actual[f"d {name}"][24:] == 0).all()
    assert (actual["d down_DF"][:, 24:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(fast, dtype):
    torch.use_deterministic_algorithms(False)  # of its own accord, not because torch was told to
    args = make(200, 24, 48, 6, 3, dtype=dtype)
    first, second = run_with_grads(fast, args), run_with_grads(fast, args)
    assert all(torch.equal(first[name], second[name]) for name in first)
    few = {k: args[k][:8] for k in ("x_ND", "experts_NK", "weights_NK")}
    assert torch.equal(run(fast, args, **few), run(fast, args, **few))


@pytest.mark.parametrize("N", [6, 40])
def test_autocast_does_not_act_inside(N):
    args = make(N, 20, 48, 6, 3)
    for implementation in ("reference", *FAST):
        expected = run(implementation, args), run_with_grads(implementation, args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = run(implementation, args), run_with_grads(implementation, args)
        assert torch.equal(actual[0], expected[0])
        assert actual[1]["y"].dtype == torch.float32 and torch.equal(actual[1]["y"], expected[1]["y"])
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in expected[1])  # backward too


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_small_shape(data):
    draw = data.draw
    E, S, D = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    N, K = draw(st.integers(0, 24)), draw(st.integers(1, E))
    biases = [b for b in BIASES if draw(st.booleans())]
    args = make(
        N, D, E * S, E, K, gated=draw(st.booleans()), biases=biases, weighted=draw(st.booleans()), dtype=torch.float64
    )
    unused = torch.rand(N, K, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.2
    args["experts_NK"] = args["experts_NK"].masked_fill(unused, -1)
    args["activation"] = draw(st.sampled_from(list(ACTIVATIONS)))
    expected = run_with_grads("reference", args)
    assert_same(run_with_grads("portable", args), expected, 1e-12)
    assert error(run("portable", args), expected["y"]) <= 1e-12


# Errors


WRONG = [
    ({"num_experts": 7}, "num_experts=7 does not divide F=48; try 6 or 8"),
    ({"num_experts": 0}, "num_experts=0 does not divide F=48"),
    ({"num_experts": 2}, "K=3 experts per token, but num_experts=2"),
    ({"experts_NK": torch.zeros(5, 3)}, "experts_NK has dtype torch.float32"),
    ({"experts_NK": torch.zeros(4, 3).long()}, r"experts_NK has shape \(4, 3\); expected \(5, 3\)"),
    ({"experts_NK": torch.zeros(5).long()}, "experts_NK has shape"),
    ({"experts_NK": torch.full((5, 3), 6)}, "experts_NK holds ids outside -1 .. 5"),
    ({"experts_NK": torch.full((5, 3), -2)}, "experts_NK holds ids outside -1 .. 5"),
    ({"x_ND": torch.zeros(5, 2, 20)}, "x_ND has shape"),
    ({"up_FD": torch.zeros(48, 21)}, "up_FD has shape"),
    ({"down_DF": torch.zeros(48, 20)}, "down_DF has shape"),
    ({"gate_FD": torch.zeros(20, 48)}, "gate_FD has shape"),
    ({"gate_FD": None}, "gate_bias_F is given without gate_FD"),
    ({"up_bias_F": torch.zeros(20)}, "up_bias_F has shape"),
    ({"gate_bias_F": torch.zeros(1)}, "gate_bias_F has shape"),
    ({"down_bias_D": torch.zeros(48)}, "down_bias_D has shape"),
    ({"weights_NK": torch.zeros(5, 6)}, "weights_NK has shape"),
    ({"weights_NK": torch.zeros(5, 3).long()}, "weights_NK has dtype"),
    ({"up_FD": torch.zeros(48, 20).bfloat16()}, "up_FD has dtype torch.bfloat16, x_ND has torch.float32"),
    ({"activation": "swiglu"}, "activation='swiglu' is unknown; known: silu, gelu"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_arguments_are_named(fast, change, message):
    with pytest.raises(ValueError, match=message):
        run(fast, make(5, 20, 48, 6, 3), **change)


WRONG_STACKED = [
    ({"num_experts": 7}, "num_experts=7, but up_FD stacks 6 experts"),
    ({"experts_NK": torch.zeros(5, 7).long()}, "K=7 experts per token, but num_experts=6"),
    ({"up_FD": torch.zeros(6, 8, 21)}, r"up_FD has shape \(6, 8, 21\); expected \(6, 8, 20\)"),
    ({"up_FD": torch.zeros(1, 6, 8, 20)}, "up_FD has shape .* expected two or three dimensions"),
    ({"up_FD": torch.zeros(48, 20)}, "num_experts is missing; up_FD of shape"),
    ({"down_DF": torch.zeros(6, 8, 20)}, r"down_DF has shape \(6, 8, 20\); expected \(6, 20, 8\)"),
    ({"down_DF": torch.zeros(20, 48)}, r"down_DF has shape \(20, 48\); expected \(6, 20, 8\)"),
    ({"gate_FD": torch.zeros(48, 20)}, "gate_FD has shape"),
    ({"up_bias_F": torch.zeros(48)}, "up_bias_F has shape"),
    ({"gate_bias_F": torch.zeros(8)}, "gate_bias_F has shape"),
    ({"gate_FD": None}, "gate_bias_F is given without gate_FD"),
    ({"down_bias_D": torch.zeros(6, 20)}, "down_bias_D has shape"),
    ({"down_DF": torch.zeros(6, 20, 8).double()}, "down_DF has dtype torch.float64, x_ND has torch.float32"),
    ({"down_DF": torch.zeros(6, 20, 8, device="meta")}, "down_DF is on meta, x_ND is on cpu"),
]


@pytest.mark.parametrize("change, message", WRONG_STACKED, ids=[m for _, m in WRONG_STACKED])
def test_wrong_stacked_arguments_are_named(fast, change, message):
    with pytest.raises(ValueError, match=message):
        run(fast, stack(make(5, 20, 48, 6, 3)), **change)


def test_the_number_of_experts_may_be_told_twice(fast):
    args = stack(make(5, 20, 48, 6, 3))
    assert torch.equal(run(fast, args, num_experts=6), run(fast, args))


def test_ids_are_checked_when_training_too(fast):
    args = make(40, 20, 48, 6, 3)
    args["experts_NK"][7, 1] = 6
    with pytest.raises(ValueError, match=r"experts_NK holds ids outside -1 .. 5"):
        run_with_grads(fast, args)


def test_portable_stands_alone():
    """Where it has been copied to, models call it with dense weights; it takes stacked ones there as well."""
    args = make(20, 12, 24, 6, 3)
    expected = run("portable", args)
    assert torch.equal(portable.expert_ffn(**args), expected)
    assert torch.equal(portable.expert_ffn(**stack(args)), expected)


def test_portable_imports_only_torch_and_the_standard_library():
    """It is copied beside converted checkpoints, where nothing of this project is installed."""
    tree = ast.parse(Path(portable.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert all(n.split(".")[0] in {"torch", *sys.stdlib_module_names} for n in names)
