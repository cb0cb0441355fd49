"""Expert linear layers against their equations: outputs, every gradient, and the laws they obey.

Legend: N tokens, D model width, E experts, S width of an expert, K experts chosen per token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from emoe_kernels import use
from emoe_kernels.experts import expert_ffn
from emoe_kernels.linear import expert_combine, expert_linear
from emoe_kernels.linear.portable import is_few


def make(op, N, D, E, S, K, *, bias=True, weighted=True, dtype=torch.float32, seed=0):
    """Arguments of `op` with stacked weights, scaled so that the output is about 1."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    experts_NK = torch.rand(N, E, generator=g).argsort(1)[:, :K]
    if op is expert_linear:
        args = {"x_ND": randn(N, D), "experts_NK": experts_NK, "weight": randn(E, S, D) / D**0.5}
        return args | ({"bias": randn(E, S)} if bias else {})
    args = {"h_NKS": randn(N, K, S), "experts_NK": experts_NK, "weight": randn(E, D, S) / (K * S) ** 0.5}
    args |= {"bias_D": randn(D)} if bias else {}
    return args | ({"weights_NK": randn(N, K).abs()} if weighted else {})


def dense(op, args):
    """The same with weights as a dense checkpoint has them."""
    E = len(args["weight"])
    if op is expert_combine:
        return args | {"weight": args["weight"].transpose(0, 1).flatten(1), "num_experts": E}
    flat = {k: args[k].flatten(0, 1) for k in ("weight", "bias") if k in args}
    return args | flat | {"num_experts": E}


def run_with_grads(implementation, op, args):
    """The output and the gradient of every floating argument, for a fixed random gradient of the output."""
    args = {k: v.detach() if torch.is_tensor(v) else v for k, v in args.items()}
    leaves = {k: v.requires_grad_() for k, v in args.items() if torch.is_tensor(v) and v.is_floating_point()}
    with use(implementation):
        out = op(**args)
        with torch.no_grad():  # few tokens go another way then
            quiet = op(**args)
            assert torch.equal(op(**args), quiet)
        assert error(quiet, out) <= (1e-5 if out.dtype.itemsize >= 4 else 2e-2)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}


def error(actual, expected):
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = (actual - expected).norm(), expected.norm()
    return float(difference / norm) if norm > 0 else float(difference)


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert error(actual[name], expected[name]) <= tolerance, name  # also fails on NaN


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


OPS = pytest.mark.parametrize("op", [expert_linear, expert_combine], ids=["linear", "combine"])

SHAPES = [  # N, D, E, S, K
    (33, 20, 6, 8, 2),  # nothing is a power of two
    (1, 16, 8, 4, 2),  # one token
    (3, 16, 32, 2, 2),  # more experts than pairs: most are empty
    (0, 16, 8, 4, 2),  # no tokens
    (20, 16, 8, 4, 8),  # K = E
    (20, 16, 1, 4, 1),  # one expert
    (5, 1, 3, 1, 2),  # widths of one
    (700, 8, 6, 4, 4),  # 2800 pairs: several groups of experts
]


@OPS
@pytest.mark.parametrize("extras", [True, False], ids=["bias and weights", "bare"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(op, shape, extras):
    args = make(op, *shape, bias=extras, weighted=extras)
    expected = run_with_grads("reference", op, args)
    assert_same(run_with_grads("portable", op, args), expected, 1e-5)

    actual = run_with_grads("portable", op, dense(op, args))
    assert error(actual["out"], expected["out"]) <= 1e-5
    assert_same(actual, run_with_grads("reference", op, dense(op, args)), 1e-5)


@OPS
def test_strided_views(op):
    args = make(op, 30, 12, 5, 6, 2)
    expected = run_with_grads("reference", op, args)
    first = "x_ND" if op is expert_linear else "h_NKS"
    strided = args | {
        first: args[first].mT.contiguous().mT,
        "weight": args["weight"].mT.contiguous().mT,
        "experts_NK": args["experts_NK"].int().t().contiguous().t(),
    }
    assert not strided["weight"].is_contiguous() and not strided[first].is_contiguous()
    assert_same(run_with_grads("portable", op, strided), expected, 1e-5)


@OPS
@pytest.mark.parametrize("transposed", [False, True], ids=["stored (out, in)", "stored (in, out)"])
def test_few_tokens_without_gradients(op, transposed):
    """Up to 2 MiB of chosen weights are gathered, in the order they are stored; above, there is a GEMM an expert."""
    for N in (1, 7, 64):
        args = make(op, N, 64, 8, 96, 3)
        args["experts_NK"][0, 1] = -1
        if op is expert_combine:
            args["h_NKS"][0, 1] = torch.nan  # is not read
        if transposed:
            args["weight"] = args["weight"].mT.contiguous().mT
        assert not is_few(args["experts_NK"], args["weight"])  # gradients are wanted
        with torch.no_grad():
            assert is_few(args["experts_NK"], args["weight"]) == (N < 64)
            with use("portable"):
                found = op(**args)
            with use("reference"):
                assert error(found, op(**args)) <= 1e-5
            args["experts_NK"][0, 0] = 8
            with use("portable"), pytest.raises(ValueError, match="outside"):
                op(**args)


def test_the_bias_of_few_tokens_is_added_before_rounding():
    """80,000 is no fp16 number, 50,000 is."""
    x_ND, weight = torch.full((1, 4), 200.0).half(), torch.full((2, 3, 4), 100.0).half()
    with use("portable"), torch.no_grad():
        out = expert_linear(x_ND, torch.tensor([[1]]), weight, torch.full((2, 3), -30000.0).half())
    assert out.flatten().tolist() == [49984.0] * 3


@OPS
def test_unused_slots(op):
    args = make(op, 20, 12, 6, 4, 3)
    unused = torch.rand(20, 3, generator=torch.Generator().manual_seed(4)) < 0.4
    unused[0] = True
    args["experts_NK"] = args["experts_NK"].masked_fill(unused, -1)
    if op is expert_combine:
        args["h_NKS"][unused] = torch.nan  # is not read
    expected, actual = run_with_grads("reference", op, args), run_with_grads("portable", op, args)
    if op is expert_combine:
        assert torch.equal(actual["out"][0], args["bias_D"])
        assert not actual["d h_NKS"][unused].any() and not actual["d weights_NK"][unused].any()
        expected["d weights_NK"][unused] = 0  # the reference multiplies the NaN there by zero
    else:
        assert not actual["out"][unused].any()
    assert_same(actual, expected, 1e-5)


@OPS
def test_gradcheck(op):
    args = make(op, 4, 3, 3, 2, 2, dtype=torch.float64)
    args["experts_NK"][0, 1] = -1
    names = [k for k, v in args.items() if v.is_floating_point()]
    leaves = tuple(args[k].requires_grad_() for k in names)

    def f(*values):
        with use("portable"):
            return op(**(args | dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(f, leaves)


@OPS
def test_only_what_is_asked_for_gets_a_gradient(op):
    args = make(op, 20, 12, 6, 4, 3)
    full = run_with_grads("portable", op, args)
    for name in (k[2:] for k in full if k != "out"):
        leaf = args[name].detach().requires_grad_()
        with use("portable"):
            out = op(**(args | {name: leaf}))
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        assert torch.equal(torch.autograd.grad(out, leaf, dout)[0], full[f"d {name}"]), name


@OPS
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_small_shape(op, data):
    draw = data.draw
    N, D, E, S = draw(st.integers(0, 20)), draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    K = draw(st.integers(1, E))
    extras = {"bias": draw(st.booleans()), "weighted": draw(st.booleans()), "dtype": torch.float64}
    args = make(op, N, D, E, S, K, **extras)
    unused = torch.rand(N, K, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.2
    args["experts_NK"] = args["experts_NK"].masked_fill(unused, -1)
    if draw(st.booleans()):
        args = dense(op, args)
    assert_same(run_with_grads("portable", op, args), run_with_grads("reference", op, args), 1e-12)


# Laws


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_with_an_activation_between_them_they_are_the_expert_ffn(gated):
    N, D, E, S, K = 40, 20, 6, 8, 3
    into, back = make(expert_linear, N, D, E, S, K), make(expert_combine, N, D, E, S, K)
    gate = make(expert_linear, N, D, E, S, K, seed=1)
    experts_NK = into["experts_NK"].clone()
    experts_NK[0, 1] = experts_NK[1] = -1

    def by_parts(x, up, up_bias, down, down_bias, weights, gate=None, gate_bias=None):
        h_NKS = expert_linear(x, experts_NK, up, up_bias)
        h_NKS = silu(h_NKS) if gate is None else silu(expert_linear(x, experts_NK, gate, gate_bias)) * h_NKS
        return expert_combine(h_NKS, experts_NK, down, down_bias, weights_NK=weights)

    def whole(x, up, up_bias, down, down_bias, weights, gate=None, gate_bias=None):
        biases = {"up_bias_F": up_bias, "gate_bias_F": gate_bias, "down_bias_D": down_bias}
        return expert_ffn(x, experts_NK, up, down, gate_FD=gate, **biases, weights_NK=weights)

    values = [into["x_ND"], into["weight"], into["bias"], back["weight"], back["bias_D"], back["weights_NK"]]
    values += [gate["weight"], gate["bias"]] if gated else []
    results = []
    for function in (by_parts, whole):
        leaves = [v.detach().requires_grad_() for v in values]
        with use("portable"):
            y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert error(actual, expected) <= 1e-5


@OPS
def test_a_bad_token_stays_alone(op):
    args = make(op, 40, 12, 6, 4, 3)
    clean = run_with_grads("portable", op, args)
    first = "x_ND" if op is expert_linear else "h_NKS"
    args[first] = args[first].clone()
    args[first][2] = torch.inf
    with use("portable"):
        dirty = op(**args)
        leaf = args[first].detach().requires_grad_()
        dout = torch.randn(dirty.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        grad = torch.autograd.grad(op(**(args | {first: leaf})), leaf, dout)[0]
    others = torch.arange(40) != 2
    assert torch.equal(dirty[others], clean["out"][others])
    assert not dirty[2].isfinite().all()
    assert torch.equal(grad, clean[f"d {first}"])  # linear: the gradient does not depend on the value


@OPS
def test_experts_nobody_chose_are_never_read(op):
    args = make(op, 40, 12, 8, 4, 2)
    args["experts_NK"] = args["experts_NK"] % 4
    args["experts_NK"][:, 1] = (args["experts_NK"][:, 0] + 1) % 4  # 4 to 7 are nobody's
    expected = run_with_grads("reference", op, args)
    args["weight"][4:] = torch.nan
    if op is expert_linear:
        args["bias"][4:] = torch.nan
    actual = run_with_grads("portable", op, args)
    assert_same(actual, expected, 1e-5)
    assert (actual["d weight"][4:] == 0).all()


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(op, dtype):
    torch.use_deterministic_algorithms(False)  # of its own accord, not because torch was told to
    args = make(op, 200, 24, 6, 8, 3, dtype=dtype)
    first, second = run_with_grads("portable", op, args), run_with_grads("portable", op, args)
    assert all(torch.equal(first[name], second[name]) for name in first)


@OPS
def test_bf16_is_as_exact_as_its_inputs(op):
    """Against fp64 on the same bf16 values. Every result is one or two roundings of 2^-9 away, whatever K is: sums over
    experts are taken in fp32."""
    args = make(op, 200, 64, 32, 16, 24, dtype=torch.bfloat16)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in args.items()}
    expected, actual = run_with_grads("reference", op, exact), run_with_grads("portable", op, args)
    for name in expected:
        assert actual[name].dtype == torch.bfloat16
        assert error(actual[name], expected[name]) <= 2**-8, name


@OPS
def test_autocast_does_not_act_inside(op):
    args = make(op, 40, 12, 6, 4, 3)
    expected = run_with_grads("portable", op, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_with_grads("portable", op, args)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# Errors

WRONG = [
    (expert_linear, {"x_ND": torch.zeros(5, 2, 20)}, "x_ND has shape .* expected two dimensions"),
    (expert_linear, {"experts_NK": torch.zeros(4, 3).long()}, r"experts_NK has shape \(4, 3\); expected \(5, 3\)"),
    (expert_linear, {"experts_NK": torch.zeros(5, 3)}, "experts_NK has dtype torch.float32"),
    (expert_linear, {"experts_NK": torch.full((5, 3), 6)}, "experts_NK holds ids outside -1 .. 5"),
    (expert_linear, {"weight": torch.zeros(6, 8, 21)}, r"weight has shape \(6, 8, 21\); expected \(6, 8, 20\)"),
    (expert_linear, {"weight": torch.zeros(48, 20)}, "num_experts is missing; weight of shape"),
    (expert_linear, {"weight": torch.zeros(48, 20), "num_experts": 7}, "num_experts=7 does not divide F=48"),
    (expert_linear, {"num_experts": 7}, "num_experts=7, but weight stacks 6 experts"),
    (expert_linear, {"bias": torch.zeros(48)}, r"bias has shape \(48,\); expected \(6, 8\)"),
    (expert_linear, {"bias": torch.zeros(6, 8).double()}, "bias has dtype torch.float64, x_ND has torch.float32"),
    (expert_combine, {"h_NKS": torch.zeros(5, 8)}, "h_NKS has shape .* expected three dimensions"),
    (
        expert_combine,
        {"h_NKS": torch.zeros(5, 3, 9)},
        r"h_NKS has shape \(5, 3, 9\); the experts of weight .* are 8 wide",
    ),
    (expert_combine, {"experts_NK": torch.zeros(5, 2).long()}, r"experts_NK has shape \(5, 2\); expected \(5, 3\)"),
    (expert_combine, {"weight": torch.zeros(20, 50), "num_experts": 6}, "num_experts=6 does not divide F=50"),
    (expert_combine, {"bias_D": torch.zeros(8)}, "bias_D has shape"),
    (expert_combine, {"weights_NK": torch.zeros(5, 3).long()}, "weights_NK has dtype"),
    (expert_combine, {"weights_NK": torch.zeros(5, 6)}, "weights_NK has shape"),
]


@pytest.mark.parametrize("op, change, message", WRONG, ids=[m for _, _, m in WRONG])
def test_wrong_arguments_are_named(op, change, message):
    with pytest.raises(ValueError, match=message), use("portable"):
        op(**(make(op, 5, 20, 6, 8, 3) | change))
