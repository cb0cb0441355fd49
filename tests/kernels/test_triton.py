"""The Triton kernels against the equation in fp64: output, every gradient, and the laws they obey.

Without a GPU, Triton interprets the kernels in NumPy if TRITON_INTERPRET=1 is set before it is imported, which is too
late in a process that runs other tests. So this file runs itself and its neighbours once more, in a process of their
own, and there their tests are the interpreted ones; in the first process they need a GPU.

Legend: N tokens, K slots per token, E experts, S neurons per expert, D model width.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from support.expert_ffn import error
from support.triton_ffn import (
    DEVICE,
    INTERPRETED,
    LAYOUTS,
    NAMES,
    SHAPES,
    TOLERANCE,
    assert_same,
    call,
    expected_ffn,
    ffn_with_grads,
    make,
    runs_kernels,
    with_grads,
)

from emoe_kernels.experts import ACTIVATIONS
from emoe_kernels.experts import triton_host as host
from emoe_kernels.experts.triton_op import expert_combine, expert_linear, plan_experts

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


FILES = ("test_triton.py", "test_triton_linear.py", "test_triton_calls.py")


@pytest.mark.skipif(INTERPRETED, reason="is what runs these tests")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"]
    command += [str(Path(__file__).with_name(name)) for name in FILES]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(child.stdout[-3000:])
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    assert " passed" in child.stdout


@runs_kernels
@pytest.mark.parametrize(
    "shape, gated",
    [(shape, True) for shape in SHAPES] + [(SHAPES[i], False) for i in (0, 3, 4, 9)],
    ids=lambda value: {True: "gated", False: "plain"}.get(value) or str(value),
)
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
