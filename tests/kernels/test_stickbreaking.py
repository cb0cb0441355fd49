"""Stick-breaking attention against its product formula: output, remainder, every gradient, and the laws it obeys.

The Triton kernels are interpreted in a process of its own that this file starts (test_triton.py says why): there the
tests of `FAST` run with "triton", which elsewhere needs a GPU, and with nothing else.

Legend: B batch, H query heads, G key heads, T queries, L keys, A width of a head.
"""

import os
import subprocess
import sys

import pytest
import torch
from support.dtypes import skip_without

from emoe_kernels import extension, use
from emoe_kernels.stickbreaking import portable, stick_breaking_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS = {
    "cpu": pytest.mark.skipif(not extension.status().available, reason=extension.status().detail),
    "triton": pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="interpreted in a process of its own"),
}
HERE = ["triton"] if INTERPRETED else ["portable", "cpu", "triton"]
FAST = pytest.mark.parametrize("implementation", [pytest.param(name, marks=NEEDS.get(name, ())) for name in HERE])
torch_only = pytest.mark.skipif(INTERPRETED, reason="has nothing to do with Triton")


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch):
    """And strips of a few queries, so that there are several."""
    monkeypatch.setattr(portable, "_STRIP_ELEMENTS", 1 << 14)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(B, H, G, T, L, A, *, sticks="short", masked=False, dtype=torch.float32, seed=0):
    """q, k, v and a mask or None. "long": logits about -5, so that far keys matter; "short": about N(0, 1)."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, *shape, A, generator=g) for shape in ((H, T), (G, L), (G, L)))
    if sticks == "long":
        q, k = q + (5 / A**0.5) ** 0.5, k - (5 / A**0.5) ** 0.5
    mask = torch.rand(B, L, generator=g) < 0.7 if masked else None
    return {"q_BHTA": q.to(dtype), "k_BGLA": k.to(dtype), "v_BGLA": v.to(dtype), "key_mask_BL": mask}


def call(implementation, args, **options):
    options = {"return_remainder": True} | options
    device = DEVICE if implementation == "triton" else "cpu"
    with use(implementation):
        return stick_breaking_attention(**{k: v if v is None else v.to(device) for k, v in args.items()}, **options)


def with_gradients(implementation, args, double=False, **options):
    """y, remainder and the gradients of q, k and v, for fixed random gradients of the two; on the CPU."""
    dtype = torch.float64 if double else args["q_BHTA"].dtype
    leaves = {name: args[name].to(dtype).detach().requires_grad_() for name in ("q_BHTA", "k_BGLA", "v_BGLA")}
    found = call(implementation, args | leaves, **options)
    g = torch.Generator().manual_seed(1)
    dy, dleft = (torch.randn(x.shape, generator=g).to(args["q_BHTA"].dtype) for x in found[:2])
    outputs = (found.y_BHTA, found.remainder_BHT)
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), tuple(x.to(y) for x, y in zip((dy, dleft), outputs, strict=True))
    )
    names = ("y", "remainder", *(f"d {name}" for name in leaves))
    return {n: x.detach().cpu() for n, x in zip(names, (*outputs, *grads), strict=True)}


def error(actual, expected):
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    # the remainder of many short sticks is 1e-30, and as good as zero
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_same(actual, expected, tolerance):
    for name in expected:
        assert error(actual[name], expected[name]) <= tolerance, name  # also fails on NaN


SHAPES = [  # B, H, G, T, L, A
    (2, 4, 2, 5, 9, 8),  # fewer keys than a block, cache of 4, 2 query heads a key head
    (1, 2, 1, 70, 90, 24),  # neither is a multiple of a block; more rows than a tile
    (2, 2, 2, 1, 70, 16),  # a step of decoding
]
WIDE = [
    (1, 6, 2, 200, 300, 20),  # several tiles of queries and keys, A not a multiple of a register
    (1, 16, 1, 1, 200, 64),  # decoding, as many query heads as a register has lanes
    (1, 17, 1, 1, 200, 64),  # one more: GEMMs
    (1, 2, 1, 33, 33, 270),  # wider than a row tile of the GEMMs
    (3, 1, 1, 1, 1, 1),  # all sizes are one
]


@FAST
@pytest.mark.parametrize("sticks, masked, current", [("short", True, True), ("long", False, False)])
@pytest.mark.parametrize("shape", SHAPES if INTERPRETED else SHAPES + WIDE, ids=str)
def test_output_and_gradients(implementation, shape, sticks, masked, current):
    args = make(*shape, sticks=sticks, masked=masked)
    expected = with_gradients("reference", args, double=True, attend_current=current)
    assert_same(with_gradients(implementation, args, attend_current=current), expected, 2e-6)


@FAST
def test_wider_than_a_tile_of_triton(implementation):
    """Logits are then sums over pieces of A, and results come piece by piece."""
    args = make(1, 2, 1, 18, 20, 70, sticks="long", masked=True)
    assert_same(with_gradients(implementation, args), with_gradients("reference", args, double=True), 2e-6)


@FAST
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)], ids=str)
def test_half_precision(implementation, dtype, tolerance):
    """Against fp64 on the same values: one or two roundings (bf16: 2^-9) of operands and of the result."""
    skip_without(implementation, dtype)
    if INTERPRETED and dtype == torch.bfloat16:
        tolerance = 9e-3  # the interpreter cuts bf16 off instead of rounding
    args = make(1, 2, 1, 40, 70, 32, sticks="long", masked=True, dtype=dtype)
    actual = with_gradients(implementation, args)
    assert {x.dtype for x in actual.values()} == {dtype}
    assert_same(actual, with_gradients("reference", args, double=True), tolerance)


@FAST
def test_strided_views_and_one_tensor_for_keys_and_values(implementation):
    """ModuleFormer's own layout, (B, T, K, G, A), and K = V: their gradients add up."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 20, 2, 2, 16, generator=g).permute(0, 2, 3, 1, 4).flatten(1, 2)
    kv = torch.randn(1, 24, 2, 16, generator=g).transpose(1, 2)
    args = {"q_BHTA": q, "k_BGLA": kv, "v_BGLA": kv}
    apart = with_gradients("reference", args, double=True)
    leaf = kv.detach().clone().requires_grad_()
    found = call(implementation, args | {"k_BGLA": leaf, "v_BGLA": leaf})
    dy, dleft = torch.randn(found.y_BHTA.shape, generator=g.manual_seed(1)), torch.randn(1, 4, 20, generator=g)
    (grad,) = torch.autograd.grad(found[:2], leaf, (dy.to(found.y_BHTA), dleft.to(found.y_BHTA)))
    assert error(found.y_BHTA.detach().cpu(), apart["y"]) <= 2e-6
    assert error(grad, apart["d k_BGLA"] + apart["d v_BGLA"]) <= 2e-6


@FAST
def test_query_head_h_looks_at_key_head_h_modulo_g(implementation):
    args = make(1, 6, 3, 4, 6, 8)
    y = call(implementation, args).y_BHTA
    for h in range(6):
        one = {"q_BHTA": args["q_BHTA"][:, h : h + 1]} | {
            n: args[n][:, h % 3 : h % 3 + 1] for n in ("k_BGLA", "v_BGLA")
        }
        assert torch.allclose(y[:, h : h + 1], call(implementation, one).y_BHTA, atol=1e-6)


# Laws


@torch_only
@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_weights_and_remainder_are_the_whole_stick(implementation):
    args = make(2, 2, 1, 40, 60, 8, masked=True)
    found = call(implementation, args, return_weights=True)
    assert torch.allclose(found.weights_BHTL.sum(3) + found.remainder_BHT, torch.ones(2, 2, 40), atol=1e-6)
    assert torch.allclose(found.weights_BHTL @ args["v_BGLA"], found.y_BHTA, atol=1e-6)
    positions, keys = torch.arange(20, 60).unsqueeze(1), torch.arange(60)
    hidden = (keys > positions) | ~args["key_mask_BL"][:, None, None]
    assert not found.weights_BHTL[hidden.expand_as(found.weights_BHTL)].any()


@FAST
def test_values_of_one_and_the_remainder_are_the_whole_stick(implementation):
    args = make(1, 2, 1, 20, 40, 16, sticks="long")
    args["v_BGLA"] = torch.ones_like(args["v_BGLA"])
    found = call(implementation, args)
    assert torch.allclose(found.y_BHTA[..., 0] + found.remainder_BHT, torch.ones(1, 2, 20).to(found.y_BHTA), atol=1e-6)


@torch_only
def test_weights_can_be_differentiated():
    args = make(1, 2, 1, 6, 9, 4, masked=True, dtype=torch.float64)
    grads = []
    for implementation in ("reference", "portable"):
        leaf = args["q_BHTA"].detach().requires_grad_()
        found = call(implementation, args | {"q_BHTA": leaf}, return_weights=True)
        grads += torch.autograd.grad(found.weights_BHTL.square().sum() + found.y_BHTA.sum(), leaf)
    assert error(*grads) <= 1e-12


@FAST
def test_left_padding_changes_nothing(implementation):
    args = make(1, 2, 1, 10, 40, 16, sticks="long")  # a short stick's remainder of 1e-11 is less exact in log space
    plain = with_gradients(implementation, args)
    shift = 7
    padded = {
        name: torch.cat([torch.full((1, x.shape[1], shift, 16), 9.0), x], 2) for name, x in list(args.items())[1:3]
    }
    mask = torch.arange(40 + shift).unsqueeze(0) >= shift
    found = with_gradients(implementation, args | padded | {"key_mask_BL": mask})
    for name in plain:
        kept = found[name][:, :, shift:] if name in ("d k_BGLA", "d v_BGLA") else found[name]
        assert error(kept, plain[name]) <= 1e-6
    assert not found["d k_BGLA"][:, :, :shift].any() and not found["d v_BGLA"][:, :, :shift].any()


@FAST
def test_who_sees_no_key_gets_zero(implementation):
    args = make(2, 2, 1, 9, 9, 8)
    args["key_mask_BL"] = torch.ones(2, 9, dtype=torch.bool)
    args["key_mask_BL"][0] = args["key_mask_BL"][1, :4] = False
    found = with_gradients(implementation, args)
    assert not found["y"][0].any() and not found["y"][1, :, :4].any() and found["y"][1, :, 4:].all()
    assert (found["remainder"][0] == 1).all() and not found["d q_BHTA"][0].any()
    first = call(implementation, make(1, 1, 1, 5, 5, 8), attend_current=False)
    assert not first.y_BHTA[0, 0, 0].any() and first.remainder_BHT[0, 0, 0] == 1


@FAST
def test_decoding_step_by_step_is_prefill(implementation):
    args = make(1, 2, 1, 12, 12, 16, masked=True)
    whole = call(implementation, args)
    for t in range(12):
        step = {"q_BHTA": args["q_BHTA"][:, :, t : t + 1], "key_mask_BL": args["key_mask_BL"][:, : t + 1]}
        cache = {name: args[name][:, :, : t + 1] for name in ("k_BGLA", "v_BGLA")}
        found = call(implementation, step | cache)
        assert torch.allclose(found.y_BHTA[:, :, 0], whole.y_BHTA[:, :, t], atol=1e-6)
        assert torch.allclose(found.remainder_BHT[:, :, 0], whole.remainder_BHT[:, :, t], atol=1e-6)


@FAST
def test_shuffling_the_batch_shuffles_the_result(implementation):
    args = make(3, 2, 1, 6, 8, 8, masked=True)
    order = [2, 0, 1]
    found = with_gradients(implementation, args)
    g = torch.Generator().manual_seed(1)  # the gradients that with_gradients draws, shuffled as well
    dy, dleft = torch.randn(3, 2, 6, 8, generator=g), torch.randn(3, 2, 6, generator=g)
    leaves = [args[name][order].requires_grad_() for name in ("q_BHTA", "k_BGLA", "v_BGLA")]
    shuffled = dict(zip(("q_BHTA", "k_BGLA", "v_BGLA"), leaves, strict=True))
    shuffled["key_mask_BL"] = args["key_mask_BL"][order]
    outputs = call(implementation, shuffled)[:2]
    grads = torch.autograd.grad(outputs, leaves, (dy[order].to(outputs[0]), dleft[order].to(outputs[0])))
    for actual, expected in zip((*outputs, *grads), found.values(), strict=True):
        assert torch.equal(actual.detach().cpu(), expected[order])


@FAST
def test_two_runs_give_the_same_bits(implementation):
    torch.use_deterministic_algorithms(False)  # of its own accord
    args = make(1, 2, 1, 40, 50, 16, masked=True)
    first, second = with_gradients(implementation, args), with_gradients(implementation, args)
    assert all(torch.equal(first[name], second[name]) for name in first)


@FAST
@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_extreme_logits(implementation, logit):
    """sigmoid is 0 or 1 in fp32: nobody takes anything, or the nearest key takes all. No NaN, no gradient but of v."""
    q, k = torch.full((1, 1, 5, 4), logit), torch.full((1, 1, 9, 4), 0.5)
    v = torch.randn(1, 1, 9, 4, generator=torch.Generator().manual_seed(0))
    found = with_gradients(implementation, {"q_BHTA": q, "k_BGLA": k, "v_BGLA": v})
    expected = v[:, :, 4:] if logit > 0 else torch.zeros(1, 1, 5, 4)
    assert torch.allclose(found["y"], expected)
    assert (found["remainder"] == float(logit < 0)).all()
    assert not found["d q_BHTA"].any() and not found["d k_BGLA"].any()
    assert bool(found["d v_BGLA"].any()) == (logit > 0)


@FAST
def test_compiled_without_a_break(implementation):
    args = make(1, 2, 1, 6, 9, 8)
    torch.compiler.reset()  # a choice is a constant of what has been compiled, and the code is the same

    def function(q, k, v):
        return stick_breaking_attention(q, k, v, return_remainder=True)[:2]

    results = []
    with use(implementation):
        for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = [args[name].detach().to(DEVICE).requires_grad_() for name in ("q_BHTA", "k_BGLA", "v_BGLA")]
            y, left = f(*leaves)
            results.append((y, left, *torch.autograd.grad(y.sum() + left.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# For some implementations only


@torch_only
@pytest.mark.parametrize("current", [True, False])
def test_gradcheck(current):
    args = make(1, 2, 1, 4, 6, 3, dtype=torch.float64, masked=True)

    def f(q, k, v):
        with use("portable"):
            options = {"key_mask_BL": args["key_mask_BL"], "attend_current": current, "return_remainder": True}
            return stick_breaking_attention(q, k, v, **options)[:2]

    assert torch.autograd.gradcheck(f, [args[n].requires_grad_() for n in ("q_BHTA", "k_BGLA", "v_BGLA")])


@torch_only
@NEEDS["cpu"]
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_far_keys_of_used_up_sticks_get_no_noise(dtype, tolerance):
    """Eight sharp keys use the stick up, hundreds behind it each would still take half. Their dz is zero, and a prefix
    sum that is off by a rounding would show hundreds of times in dq."""
    skip_without("cpu", dtype)
    q, k = torch.ones(1, 1, 8, 16), torch.full((1, 1, 400, 16), 0.05)
    k[:, :, -12:] = 1.0
    v = torch.randn(1, 1, 400, 16, generator=torch.Generator().manual_seed(0))
    args = {"q_BHTA": q.to(dtype), "k_BGLA": k.to(dtype), "v_BGLA": v.to(dtype)}
    expected = with_gradients("reference", args, double=True)
    for implementation in ("cpu", "portable"):
        assert_same(with_gradients(implementation, args), expected, tolerance)


@torch_only
@NEEDS["cpu"]
def test_the_number_of_threads_changes_no_bit():
    torch.use_deterministic_algorithms(False)
    args, before, found = make(1, 4, 1, 150, 150, 16), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients("cpu", args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@torch_only
@NEEDS["cpu"]
@pytest.mark.parametrize("T", [1, 40], ids=["decoding", "prefill"])
def test_padding_is_never_read(T):
    args = make(1, 2, 1, T, 80, 16, masked=True)
    expected = with_gradients("cpu", args)
    for name in ("k_BGLA", "v_BGLA"):
        args[name] = args[name].masked_fill(~args["key_mask_BL"][:, None, :, None], torch.nan)
    actual = with_gradients("cpu", args)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@torch_only
def test_memory_does_not_grow_with_queries_times_keys(monkeypatch):
    """No tensor of the portable path is larger than a strip, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                self.elements = max(self.elements, out.numel())
            return out

    monkeypatch.setattr(portable, "_STRIP_ELEMENTS", 1 << 14)
    args = make(1, 2, 1, 512, 512, 8)
    with Largest() as largest:
        with_gradients("portable", args)
    assert largest.elements <= 1 << 14


# Errors

WRONG = [
    ({"q_BHTA": torch.zeros(2, 5, 8)}, r"q_BHTA has shape \(2, 5, 8\); expected four dimensions"),
    ({"q_BHTA": torch.zeros(2, 3, 5, 8)}, "H=3 heads of width A=8; expected a multiple of the G=2"),
    ({"q_BHTA": torch.zeros(2, 4, 10, 8)}, "T=10 queries, but k_BGLA only L=9 positions"),
    ({"q_BHTA": torch.zeros(2, 4, 5, 8).long()}, "q_BHTA has dtype torch.int64"),
    ({"v_BGLA": torch.zeros(2, 2, 9, 7)}, r"v_BGLA has shape \(2, 2, 9, 7\); expected \(2, 2, 9, 8\)"),
    ({"k_BGLA": torch.zeros(2, 2, 9, 8).half()}, "k_BGLA has dtype torch.float16, q_BHTA has torch.float32"),
    ({"key_mask_BL": torch.ones(2, 8).bool()}, r"key_mask_BL has shape \(2, 8\); expected \(2, 9\)"),
    ({"key_mask_BL": torch.ones(2, 9)}, "key_mask_BL has dtype torch.float32; expected torch.bool"),
]


@torch_only
@pytest.mark.parametrize("change, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        call("portable", make(2, 4, 2, 5, 9, 8) | change)


@torch_only
@NEEDS["cpu"]
def test_what_the_extension_cannot_take_goes_to_portable():
    skip_without("cpu", torch.bfloat16)
    args = make(1, 1, 1, 3, 5, 7, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="'cpu' was asked for, but in bfloat16 the C\\+\\+ kernels take pairs, and A=7"
    ):
        call("cpu", args)
    expected = call("portable", args)
    assert all(torch.equal(a, b) for a, b in zip(call("auto", args)[:2], expected[:2], strict=True))


@torch_only
@NEEDS["cpu"]
def test_the_operators_refuse_to_be_differentiated():
    q = torch.ones(1, 1, 3, 4, requires_grad=True)
    with use("cpu"):
        stick_breaking_attention(q, q, q)  # loads them
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.ops.emoe_cpu.stick_breaking(q, q, q, None, True, 1.0)[0].sum().backward()


@torch_only
def test_interpreted():
    """This file once more, where Triton interprets: see above."""
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        pytest.skip("the kernels run on the GPU")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
