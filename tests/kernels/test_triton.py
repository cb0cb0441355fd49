"""The Triton kernels against the equation in fp64: output, every gradient, and the laws they obey.

Without a GPU, Triton interprets the kernels in NumPy if TRITON_INTERPRET=1 is set before it is imported, which is too
late in a process that runs other tests. So this file runs itself once more, in a process of its own, and there its
tests are the interpreted ones; in the first process they need a GPU.

Legend: N tokens, K slots per token, E experts, S neurons per expert, D model width.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import emoe_kernels.experts
import emoe_kernels.linear
from emoe_kernels import dispatch, use
from emoe_kernels.experts import ACTIVATIONS, triton_tune
from emoe_kernels.experts import triton_configs as configs
from emoe_kernels.experts import triton_host as host
from emoe_kernels.experts.triton_op import expert_combine, expert_ffn, expert_linear, plan_experts, supports

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 8e-3}
"""Norm of the difference over norm of the expected: sums in another order; 16-bit hidden values and gradients. The
interpreter cuts bf16 off where hardware rounds, which makes 0.015 of 0.004."""

runs_kernels = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu


@pytest.mark.skipif(INTERPRETED, reason="is what runs these tests")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(child.stdout[-3000:])
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    assert " passed" in child.stdout


def oracle_ffn(x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights, activation):
    """The equation, dense, on (E, S, D), (E, D, S) weights."""
    chosen_NKE = experts.unsqueeze(-1) == torch.arange(up.shape[0], device=x.device)
    weights_NE = (chosen_NKE * (1.0 if weights is None else weights.unsqueeze(-1))).sum(1)
    project = lambda w, b: torch.einsum("nd,esd->nes", x, w) + (0 if b is None else b)  # noqa: E731
    act = ACTIVATIONS[activation].forward
    h_NES = act(project(up, up_bias)) if gate is None else act(project(gate, gate_bias)) * project(up, up_bias)
    return torch.einsum("nes,ne,eds->nd", h_NES, weights_NE, down) + (0 if down_bias is None else down_bias)


NAMES = ("x", "up", "down", "gate", "up_bias", "gate_bias", "down_bias", "weights")
LAYOUTS = ("dense", "conv1d", "stacked")


def make(N, D, S, E, K, *, gated=True, biases=True, weighted=True, dtype=torch.float32, layout="dense", seed=0):
    """Arguments by name, pre-activations and outputs of about 1. Each layout is one in which checkpoints come."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)  # noqa: E731
    if layout == "dense":  # torch.nn.Linear
        up, gate = ((randn(E * S, D) / D**0.5).unflatten(0, (E, S)) for _ in range(2))
        down = (randn(D, E * S) / (K * S) ** 0.5).unflatten(1, (E, S)).permute(1, 0, 2)
    elif layout == "conv1d":  # GPT-2: transposed
        up, gate = ((randn(D, E * S) / D**0.5).unflatten(1, (E, S)).permute(1, 2, 0) for _ in range(2))
        down = (randn(E * S, D) / (K * S) ** 0.5).unflatten(0, (E, S)).transpose(1, 2)
    else:  # Mixtral in transformers: gate and up in one
        gate, up = (randn(E, 2 * S, D) / D**0.5).chunk(2, dim=1)
        down = randn(E, D, S) / (K * S) ** 0.5
    args = {
        "x": randn(N, D),
        "experts": torch.rand(N, E, generator=g).argsort(1)[:, :K].to(DEVICE),
        "up": up,
        "down": down,
        "gate": gate if gated else None,
        "up_bias": randn(E, S) if biases else None,
        "gate_bias": randn(E, S) if biases and gated else None,
        "down_bias": randn(D) if biases else None,
        "weights": randn(N, K).abs() if weighted else None,
    }
    return args


def call(args, activation="silu", function=expert_ffn):
    return function(
        args["x"],
        args["experts"],
        args["up"],
        args["down"],
        gate_ESD=args["gate"],
        up_bias_ES=args["up_bias"],
        gate_bias_ES=args["gate_bias"],
        down_bias_D=args["down_bias"],
        activation=activation,
        weights_NK=args["weights"],
    )


def with_grads(run, args, names=NAMES, double=False):
    """y and the gradients of the named arguments that are there, for a fixed random dy."""
    widen = lambda v: v.double() if double and torch.is_floating_point(v) else v.detach()  # noqa: E731
    values = {k: None if v is None else widen(v) for k, v in args.items()}
    leaves = {k: values[k].detach().requires_grad_() for k in names if values[k] is not None}
    y = run(values | leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dy = dy.to(y.device, args["x"].dtype).to(y.dtype)  # the same rounded values for both
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d {k}": v for k, v in zip(leaves, grads, strict=True)}


def ffn_with_grads(args, activation="silu", names=NAMES):
    return with_grads(lambda a: call(a, activation), args, names)


def expected_ffn(args, activation="silu"):
    return with_grads(lambda a: oracle_ffn(**a, activation=activation), args, double=True)


def error(actual, expected):
    assert actual.shape == expected.shape
    difference, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name]) for name in expected}
    print(max(errors.values()), errors)
    assert all(e <= tolerance for e in errors.values()), errors  # also fails on NaN


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty gives NaN, so that a row which no program wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SHAPES = [  # N, D, S, E, K
    (33, 40, 11, 6, 2),  # the common case: nothing is a power of two
    (32, 64, 32, 4, 2),  # everything is
    (1, 16, 8, 8, 2),  # one token: rows of one
    (3, 16, 4, 32, 2),  # more experts than pairs: most are empty
    (0, 16, 4, 8, 2),  # no tokens: empty output, zero gradients
    (10, 16, 4, 5, 5),  # K = E: dense
    (9, 1, 1, 3, 1),  # one neuron, one column
    (20, 16, 8, 1, 1),  # one expert
    (150, 24, 8, 3, 2),  # 100 rows an expert: the tallest tiles, and two chunks of the plan
    (9, 20, 172, 3, 2),  # 172 neurons as in Llama 7B: several tiles and a tail
]


@runs_kernels
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ffn(shape, gated):
    args = make(*shape, gated=gated)
    expected = expected_ffn(args)
    assert_same(ffn_with_grads(args), expected, 1e-5)
    assert error(call(args), expected["y"]) <= 1e-5  # without gradients nothing is kept


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 8, 9)], ids=str)
def test_ffn_in_16_bits(shape, dtype):
    args = make(*shape, dtype=dtype)
    args["weights"] = args["weights"].float()  # routers compute in fp32
    actual = ffn_with_grads(args)
    assert_same(actual, expected_ffn(args), TOLERANCE[dtype])
    assert all(v.dtype == (torch.float32 if k == "d weights" else dtype) for k, v in actual.items())


@runs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_checkpoints(layout):
    args = make(21, 20, 12, 4, 2, layout=layout)
    before = {k: args[k].stride() for k in ("up", "down", "gate")}
    actual = ffn_with_grads(args)
    assert_same(actual, expected_ffn(args), 1e-5)
    if layout != "stacked":  # a slice of a fused tensor has no dense gradient of its own
        assert {k: actual[f"d {k}"].stride() for k in before} == before  # back to the checkpoint's shape for free


@runs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_activations(activation, gated):
    args = make(12, 12, 8, 3, 2, gated=gated)
    args["x"] *= 3  # into the tails
    assert_same(ffn_with_grads(args, activation), expected_ffn(args, activation), 1e-5)


@runs_kernels
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
def test_unused_slots(ids):
    args = make(17, 12, 8, 5, 3)
    args["experts"] = args["experts"].to(ids)
    args["experts"][torch.rand(17, 3, generator=torch.Generator().manual_seed(0)) < 0.5] = -1
    args["experts"][0] = -1  # a token without experts
    actual = ffn_with_grads(args)
    assert_same(actual, expected_ffn(args), 1e-5)
    assert torch.equal(actual["y"][0], args["down_bias"])
    assert not actual["d weights"][args["experts"] == -1].any()

    args["experts"].fill_(-1)
    actual = ffn_with_grads(args)
    assert torch.equal(actual["y"], args["down_bias"].expand(17, -1))
    assert all(not v.any() for k, v in actual.items() if k not in ("y", "d down_bias"))


@runs_kernels
def test_anything_may_be_non_contiguous():
    args = make(13, 12, 8, 4, 3)
    args["x"] = args["x"].t().contiguous().t()
    args["experts"] = args["experts"].t().contiguous().t()
    args["weights"] = args["weights"].t().contiguous().t()
    args["down_bias"] = args["down_bias"].repeat_interleave(2)[::2]
    args["up_bias"] = args["up_bias"].t().contiguous().t()
    assert_same(ffn_with_grads(args), expected_ffn(args), 1e-5)
    args["x"] = torch.cat([args["x"], args["x"]], 1)[:, 12:]
    y = call(args | {"x": args["x"].requires_grad_()})
    y.sum().backward()  # dy has strides (0, 0)
    assert torch.equal(y.detach(), call(args).detach())


@runs_kernels
def test_d_in_chunks(monkeypatch):
    """A sum over k in several chunks of D gives the bits of one chunk."""
    args = make(9, 300, 8, 3, 2)
    whole = ffn_with_grads(args)
    assert_same(whole, expected_ffn(args), 1e-5)
    monkeypatch.setattr(host, "PART_BYTES", 1)
    chunked = ffn_with_grads(args)
    assert all(torch.equal(chunked[k], whole[k]) for k in whole)


@runs_kernels
def test_only_what_is_asked_for_gets_a_gradient():
    args = make(9, 12, 8, 3, 2)
    full = ffn_with_grads(args)
    for name in NAMES:
        assert torch.equal(ffn_with_grads(args, names=(name,))[f"d {name}"], full[f"d {name}"]), name


@runs_kernels
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_small_shape(data):
    draw = data.draw
    E = draw(st.integers(1, 5))
    shape = draw(st.integers(0, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 20)), E, draw(st.integers(1, E))
    flags = {name: draw(st.booleans()) for name in ("gated", "biases", "weighted")}
    args = make(*shape, **flags, layout=draw(st.sampled_from(LAYOUTS)))
    unused = torch.rand(args["experts"].shape, generator=torch.Generator().manual_seed(3)) < 0.2
    args["experts"][unused.to(DEVICE)] = -1
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    # a ReLU's hidden values may all be zero, and a gradient then has no norm to compare with
    assert_same(ffn_with_grads(args, activation), expected_ffn(args, activation), 1e-5)


# Laws


@runs_kernels
def test_two_runs_give_the_same_bits():
    args = make(40, 24, 8, 4, 3)
    first, second = ffn_with_grads(args), ffn_with_grads(args)
    assert all(torch.equal(first[k], second[k]) for k in first)


@runs_kernels
@pytest.mark.parametrize("activation", ["silu", "relu"])  # a maximum would turn NaN into 0
def test_a_bad_token_stays_alone(activation):
    args = make(12, 20, 8, 4, 2)
    clean = ffn_with_grads(args, activation)
    args["x"] = args["x"].clone()
    args["x"][2, 3] = torch.nan
    dirty = ffn_with_grads(args, activation)
    others = torch.arange(12, device=DEVICE) != 2
    for name in ("y", "d x", "d weights"):
        assert torch.equal(dirty[name][others], clean[name][others])
    assert dirty["y"][2].isnan().all()


@runs_kernels
def test_experts_nobody_chose_are_never_read():
    args = make(12, 20, 8, 6, 2)
    args["experts"] %= 3
    args["experts"][:, 1] = (args["experts"][:, 0] + 1) % 3
    expected = expected_ffn(args)
    for name in ("up", "gate", "up_bias", "gate_bias", "down"):
        args[name][3:] = torch.nan
    actual = ffn_with_grads(args)
    assert_same(actual, expected, 1e-5)
    for name in ("up", "gate", "up_bias", "gate_bias", "down"):
        assert (actual[f"d {name}"][3:] == 0).all()


@runs_kernels
def test_a_token_does_not_depend_on_its_batch_mates():
    args = make(20, 20, 8, 4, 2)
    y = call(args)
    alone = call(args | {k: args[k][7:8] for k in ("x", "experts", "weights")})
    assert error(alone, y[7:8]) <= 1e-6


@runs_kernels
@pytest.mark.parametrize("P, E", [(1, 1), (40, 5), (300, 3), (300, 130)])  # 128 slots a chunk
def test_the_plan_is_a_stable_sort(P, E):
    """Stable, so that sums over the rows of an expert are taken in the order of tokens."""
    ids = torch.randint(-1, E, (P, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets, slots = plan_experts(ids, E)
    keys = ids[:, 0].where(ids[:, 0] >= 0, E)  # unused slots last
    assert torch.equal(slots.long(), keys.sort(stable=True).indices)
    assert offsets.tolist() == [int((keys < e).sum()) for e in range(E + 1)]


# Grouped linears


def run_linear(a):
    return expert_linear(a["x"], a["experts"], a["up"], a["up_bias"])


def oracle_linear(a):
    chosen_NKE = (a["experts"].unsqueeze(-1) == torch.arange(len(a["up"]), device=DEVICE)).double()
    bias = 0 if a["up_bias"] is None else torch.einsum("nke,es->nks", chosen_NKE, a["up_bias"])
    return torch.einsum("nd,nke,esd->nks", a["x"], chosen_NKE, a["up"]) + bias


def run_combine(a):
    return expert_combine(a["h"], a["experts"], a["down"], a["down_bias"], a["weights"])


def oracle_combine(a):
    chosen_NKE = (a["experts"].unsqueeze(-1) == torch.arange(len(a["down"]), device=DEVICE)).double()
    weights = torch.ones_like(a["h"][..., 0]) if a["weights"] is None else a["weights"]
    bias = 0 if a["down_bias"] is None else a["down_bias"]
    return torch.einsum("nks,nke,nk,eds->nd", a["h"], chosen_NKE, weights, a["down"]) + bias


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("extras", [True, False], ids=["bias and weights", "bare"])
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 4)] + [(70, 20, 24, 2, 2)], ids=str)
def test_grouped_linears(shape, extras, dtype):
    args = make(*shape, dtype=dtype, biases=extras, weighted=extras)
    args["experts"][::3, 0] = -1
    N, _, S, _, K = shape
    args["h"] = torch.randn(N, K, S, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    names = ("x", "up", "up_bias")
    expected = with_grads(oracle_linear, args, names, double=True)
    assert_same(with_grads(run_linear, args, names), expected, TOLERANCE[dtype])
    names = ("h", "down", "down_bias", "weights")
    expected = with_grads(oracle_combine, args, names, double=True)
    args["h"][args["experts"] == -1] = torch.nan  # nobody reads unused slots
    actual = with_grads(run_combine, args, names)
    assert_same(actual, expected, TOLERANCE[dtype])
    for name in names:
        if args[name] is not None:
            assert torch.equal(with_grads(run_combine, args, (name,))[f"d {name}"], actual[f"d {name}"])


@runs_kernels
def test_a_linear_and_its_inverse_can_share_a_plan():
    args = make(9, 12, 8, 4, 2)
    plan = plan_experts(args["experts"], 4)
    h = expert_linear(args["x"], args["experts"], args["up"], plan=plan)
    y = expert_combine(h, args["experts"], args["down"], plan=plan)
    expected = expert_combine(expert_linear(args["x"], args["experts"], args["up"]), args["experts"], args["down"])
    assert torch.equal(y, expected)


# torch.compile


@runs_kernels
def test_compiles_as_one_graph():
    args = make(12, 16, 16, 4, 2)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = with_grads(compiled, args), ffn_with_grads(args)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    with torch.no_grad():
        assert torch.equal(compiled(args), call(args))
    for N in (7, 9):  # another number of tokens makes it a symbol
        args = make(N, 16, 16, 4, 2)
        actual, expected = with_grads(compiled, args), ffn_with_grads(args)
        assert all(torch.equal(actual[k], expected[k]) for k in expected)

    def attention(x, experts, into, out, weights):
        return expert_combine(torch.tanh(expert_linear(x, experts, into)), experts, out, weights_NK=weights)

    leaves = [args[k].detach().requires_grad_() for k in ("x", "up", "down", "weights")]
    call_with = lambda f: f(leaves[0], args["experts"], *leaves[1:])  # noqa: E731
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(call_with(f).sum(), leaves) for f in (compiled, attention)), strict=True):
        assert torch.equal(a, b)


@runs_kernels
def test_ops_are_registered_as_torch_wants():
    """Schema, fake against real, autograd. S a multiple of 16: what pads the rows of a buffer is not compared."""
    torch.use_deterministic_algorithms(False)
    ops = torch.ops.emoe_kernels
    a = make(8, 16, 16, 2, 2)
    offsets, slots = plan_experts(a["experts"], 2)
    torch.library.opcheck(ops.triton_plan, (a["experts"], 2))
    x, up, down, gate, up_bias, gate_bias, down_bias, weights = (a[name].clone().requires_grad_() for name in NAMES)
    arguments = (x, a["experts"], offsets, slots, up, down, gate, up_bias, gate_bias, down_bias, weights, "silu", True)
    torch.library.opcheck(ops.triton_ffn, arguments)
    h = torch.randn(8, 2, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(ops.triton_linear, (x, a["experts"], offsets, slots, up, up_bias))
    torch.library.opcheck(ops.triton_combine, (h, a["experts"], offsets, slots, down, down_bias, weights))


# Errors


@runs_kernels
@pytest.mark.parametrize("bad", [6, -2, 2**40])
def test_bad_ids(bad):
    args = make(7, 12, 8, 6, 3)
    args["experts"][4, 1] = bad
    if DEVICE == "cuda":
        pytest.skip("a device-side assertion ends the process's use of the GPU")
    with pytest.raises(ValueError, match=r"experts_NK holds ids outside -1 .. 5 \(num_experts=6\)"):
        call(args)


WRONG = [
    ({"down": torch.zeros(6, 8, 12)}, "down_EDS has shape"),
    ({"gate": torch.zeros(6, 9, 12)}, "gate_ESD has shape"),
    ({"weights": torch.zeros(7, 2)}, "weights_NK has shape"),
    ({"weights": torch.zeros(7, 3).long()}, "weights_NK has dtype torch.int64"),
    ({"up": torch.zeros(6, 8, 12).half()}, "up_ESD has dtype torch.float16, x has torch.float32"),
    ({"x": torch.zeros(7, 12).double()}, "x has dtype torch.float64; the Triton kernels take fp32, bf16 and fp16"),
    ({"experts": torch.zeros(7, 3)}, "experts_NK has dtype torch.float32"),
]


@runs_kernels
@pytest.mark.parametrize("change, message", WRONG, ids=[m for _, m in WRONG])
def test_what_memory_depends_on_is_checked_in_the_ops(change, message):
    change = {k: v if v is None else v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        call(make(7, 12, 8, 6, 3) | change)


@runs_kernels
def test_a_plan_of_something_else_is_refused():
    a = make(7, 12, 8, 6, 3)
    h = torch.zeros(7, 3, 8, device=DEVICE)
    for ids, E in ((a["experts"] % 5, 5), (a["experts"][:4], 6)):
        plan = plan_experts(ids, E)
        with pytest.raises(ValueError, match="the plan has shapes"):
            expert_linear(a["x"], a["experts"], a["up"], plan=plan)
        with pytest.raises(ValueError, match="the plan has shapes"):
            expert_combine(h, a["experts"], a["down"], plan=plan)
        with pytest.raises(ValueError, match="the plan has shapes"):
            torch.ops.emoe_kernels.triton_linear(a["x"], a["experts"], *plan, a["up"], None)


@pytest.mark.skipif(INTERPRETED, reason="CPU tensors are fine there")
def test_cpu_tensors_are_refused():
    x, experts = torch.zeros(2, 4), torch.zeros(2, 1).long()
    with pytest.raises(ValueError, match="need a GPU, but the tensors are on cpu"):
        expert_ffn(x, experts, torch.zeros(2, 3, 4), torch.zeros(2, 4, 3))


def test_supports():
    assert supports(torch.zeros(1), None) is None
    assert "not float64" in supports(torch.zeros(1).double(), None)


def test_a_gpu_too_old_is_known_before_the_first_call(monkeypatch):
    """The dispatch says what `supports` will say: on a T4 nobody is promised kernels that then refuse every call."""
    capability = {0: (7, 5), 1: (8, 0)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("EMOE_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    for count, name in ((1, "portable"), (2, "triton")):
        monkeypatch.setattr(dispatch, "_settled", {})
        monkeypatch.setattr(dispatch, "_too_old", {})
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert dispatch.explain("cuda").name == name
    assert "8.0 (Ampere), not 7.5" in dispatch.gpu_too_old(0)
    assert dispatch.gpu_too_old(1) is None


# Through the public functions


def public_ffn(a):
    """Dense weights, as a checkpoint has them."""
    up, gate = (a[name].flatten(0, 1) for name in ("up", "gate"))
    biases = {f"{name}_F": a[name].flatten() for name in ("up_bias", "gate_bias")}
    down = a["down"].transpose(0, 1).flatten(1)
    return emoe_kernels.experts.expert_ffn(
        a["x"],
        a["experts"],
        up,
        down,
        num_experts=a["up"].shape[0],
        gate_FD=gate,
        **biases,
        down_bias_D=a["down_bias"],
        weights_NK=a["weights"],
    )


def public_linears(a):
    linear = emoe_kernels.linear
    h = linear.expert_linear(a["x"], a["experts"], a["up"], a["up_bias"])
    return linear.expert_combine(h.tanh(), a["experts"], a["down"], a["down_bias"], weights_NK=a["weights"])


@runs_kernels
@pytest.mark.parametrize("function", [public_ffn, public_linears])
def test_the_public_functions_come_here(function, monkeypatch):
    args = make(12, 16, 16, 4, 2)
    args["experts"][3, 1] = -1
    names = NAMES if function is public_ffn else ("x", "up", "down", "up_bias", "down_bias", "weights")
    with use("reference"):
        expected = with_grads(function, args, names, double=True)
    launched = []
    real = host.launch
    monkeypatch.setattr(host, "launch", lambda kernel, *a, **k: (launched.append(kernel), real(kernel, *a, **k)))
    with use("triton"):
        actual = with_grads(function, args, names)
        compiled = with_grads(torch.compile(function, fullgraph=True, backend="aot_eager"), args, names)
    assert host.grad_weight_kernel in launched
    assert_same(actual, expected, 1e-5)
    assert all(torch.equal(compiled[k], actual[k]) for k in actual)
    with use("triton"), pytest.raises(ValueError, match="not float64"):
        function({k: v.double() if v.is_floating_point() else v for k, v in args.items()})


# Tuning


@runs_kernels
@pytest.mark.filterwarnings("ignore:.*No such file")
@pytest.mark.parametrize("gated, transposed", [(True, False), (False, True)], ids=["Llama", "GPT-2"])
def test_tuning_finds_the_fastest(gated, transposed, own_file, monkeypatch):
    """With a stopwatch of ours, which likes narrow tiles, and in which some tiles do not run."""

    def stopwatch(step):
        if not asked:
            step()
        own = configs.user_configs()
        tiles = [tile for key, tile in own.items() if "/linear/" in key and key.endswith(columns)]
        if tiles and tiles[0].stages == 5:
            raise RuntimeError("out of shared memory")
        return float(tiles[0].bn) if tiles else 1.0

    asked, real, columns = set(), configs.choose, "/columns"
    monkeypatch.setattr(configs, "choose", lambda arch, case: (asked.add(str(case)), real(arch, case))[1])
    monkeypatch.setattr(triton_tune, "milliseconds", stopwatch)
    options = {"gated": gated, "transposed": transposed, "dtype": torch.float32, "device": DEVICE}
    found = triton_tune.tune(8, 16, 8, 2, 1, **options)
    assert found.keys() == asked  # what the layer launches, no more and no less
    assert any("/hidden/" in key for key in found) == gated
    assert next(tile.bn for key, tile in found.items() if "/linear/" in key and key.endswith(columns)) == 32
    configs.user_configs.cache_clear()
    assert configs.user_configs() == found


@pytest.mark.gpu
def test_tuning_on_a_gpu(own_file):
    assert len(triton_tune.tune(64, 256, 88, 8, 2)) == 6
    args = make(64, 256, 88, 8, 2, dtype=torch.bfloat16)
    assert_same(ffn_with_grads(args), expected_ffn(args), TOLERANCE[torch.bfloat16])


def test_importing_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import emoe_kernels.experts"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
