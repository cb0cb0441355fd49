"""The compiled CPU kernels: what happens where they cannot be had, and what holds for them alone.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dtypes import refusal, skip_without
from torch.nn.functional import linear, silu

from emoe_kernels import extension, use
from emoe_kernels.experts import ACTIVATIONS, expert_ffn

needs_extension = pytest.mark.skipif(not extension.status().available, reason=extension.status().detail)

CALL = """
import torch
from emoe_kernels.experts import expert_ffn
x, up, down = torch.ones(3, 8), torch.ones(16, 8), torch.ones(8, 16)
for _ in range(2):
    y = expert_ffn(x, torch.tensor([[0], [1], [1]]), up, down, num_experts=2, activation="relu")
print(float(y.sum()))
"""


def python(code, **environment):
    """Output, errors and exit status of a fresh process."""
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "EMOE_KERNELS": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    return done.stdout.strip(), done.stderr.strip().splitlines(), done.returncode


@needs_extension
def test_without_a_compiler_plain_pytorch_runs_after_one_warning(tmp_path):
    out, err, status = python(CALL, CXX="no-such-compiler", EMOE_KERNELS_CACHE=str(tmp_path))
    assert (out, status) == ("1536.0", 0)
    assert len(err) == 1 and "apt-get install g++" in err[0] and "plain PyTorch" in err[0]


@needs_extension
def test_a_compiler_that_fails_leaves_its_output_and_no_library(tmp_path):
    compiler = tmp_path / "c++"
    # it answers torch's questions about its version, and fails when it comes to compiling
    compiler.write_text(
        f"#!/bin/sh\ncase \"$*\" in *-c*) echo 'internal compiler error' >&2; exit 1;; esac\n"
        f'exec {extension.compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    out, err, status = python(CALL, CXX=str(compiler), EMOE_KERNELS_CACHE=str(cache))
    assert (out, status) == ("1536.0", 0)
    (log,) = cache.rglob("build.log")
    assert str(log) in err[-1] and "internal compiler error" in log.read_text()
    assert not list(cache.rglob("*.so")) and not list(cache.rglob("build-*"))


@needs_extension
def test_asked_for_and_not_to_be_had_is_an_error(tmp_path):
    out, err, status = python(CALL, CXX="no-such-compiler", EMOE_KERNELS_CACHE=str(tmp_path), EMOE_KERNELS="cpu")
    assert status != 0 and out == ""
    assert "'cpu' was asked for" in err[-1] and "g++" in err[-1]


@needs_extension
def test_a_damaged_library_is_compiled_again(tmp_path):
    """Here without a compiler, so that plain PyTorch runs; the damaged file is gone and does no further harm."""
    path = extension.status().path
    damaged = tmp_path / path.parent.name / path.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not a library")
    out, err, status = python(CALL, EMOE_KERNELS_CACHE=str(tmp_path), CXX="no-such-compiler")
    assert (out, status) == ("1536.0", 0)
    assert "compiled again" in err[0] and "plain PyTorch" in err[-1] and not damaged.exists()


@needs_extension
def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path):
    path = extension.status().path
    copy = tmp_path / path.parent.name / path.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(path.read_bytes())
    assert python(CALL, EMOE_KERNELS_CACHE=str(tmp_path), EMOE_KERNELS="cpu")[2] == 0
    copy.chmod(0o777)
    out, err, status = python(CALL, EMOE_KERNELS_CACHE=str(tmp_path))
    assert (out, status) == ("1536.0", 0)
    assert len(err) == 1 and f"others than you can write to {copy}" in err[0]


@needs_extension
def test_without_a_home_directory_plain_pytorch_runs(tmp_path):
    home = tmp_path / "file"
    home.write_text("")  # mkdir below it fails
    out, err, status = python(CALL, HOME=str(home), EMOE_KERNELS_CACHE="")
    assert (out, status) == ("1536.0", 0)
    assert "plain PyTorch" in err[-1]


@needs_extension
@pytest.mark.parametrize(("D", "S", "slow"), [(512, 256, True), (256, 256, False)])
def test_large_blocks_stored_transposed_go_to_torch(D, S, slow):
    from emoe_kernels.experts import cpu

    up_ESD, down_EDS, x_ND = torch.zeros(2, S, D), torch.zeros(2, D, S), torch.zeros(1, D)
    turned = lambda w: w.mT.contiguous().mT  # noqa: E731
    assert not cpu.is_slow(x_ND, up_ESD, down_EDS, None)
    assert cpu.is_slow(x_ND, turned(up_ESD), turned(down_EDS), None) == slow
    assert cpu.is_slow(x_ND, up_ESD, turned(down_EDS), None) == slow


@needs_extension
def test_bf16_needs_a_processor_that_multiplies_it():
    """AVX-512 without bf16, which oneDNN can be made to believe in: the reason is given and plain PyTorch runs."""
    code = """
import torch
from emoe_kernels import use
from emoe_kernels.experts import cpu, expert_ffn
x, up, down = torch.ones(200, 8).bfloat16(), torch.ones(16, 8).bfloat16(), torch.ones(8, 16).bfloat16()
call = lambda: expert_ffn(x, torch.zeros(200, 1).long(), up, down, num_experts=2, activation="relu")
print(float(call()[0, 0]), "avx512_bf16" in cpu.supports(x, up.view(2, 8, 8), None, None))
with use("cpu"):
    call()
"""
    out, err, status = python(code, ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    assert out == "64.0 True" and status == 1
    assert "'cpu' was asked for, but oneDNN has no bfloat16 kernels" in err[-1]


def test_status_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(extension, "features", lambda: frozenset({"avx2"}))
    status = extension.status()
    assert not status.available and status.path is None
    assert "fma" in status.detail and "avx2" not in status.detail.split("lacks")[1]
    monkeypatch.setattr(extension.platform, "machine", lambda: "aarch64")
    assert "aarch64" in extension.status().detail


def test_incomplete_avx512_is_avx2(monkeypatch):
    monkeypatch.setattr(extension, "features", lambda: frozenset({"avx2", "fma", "f16c", "avx512f"}))
    flags = extension._compiler_flags()
    assert "-mno-avx512f" in flags and "-DCPU_CAPABILITY_AVX2" in flags


@needs_extension
def test_the_activations_are_numbered_alike():
    from emoe_kernels.experts.cpu import _ACTIVATIONS

    header = (Path(extension.__file__).parent / "csrc" / "activations.h").read_text()
    listed = header.split("enum class Activation")[1].split("{")[1].split("}")[0]
    assert [name.strip() for name in listed.split(",")] == list(_ACTIVATIONS) == list(ACTIVATIONS)


def arguments(N, D, F, E, K, dtype, seed=0, gated=True):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return {
        "x_ND": randn(N, D),
        "experts_NK": torch.rand(N, E, generator=g).argsort(1)[:, :K],
        "up_FD": randn(F, D) / D**0.5,
        "down_DF": randn(D, F) / F**0.5,
        "gate_FD": randn(F, D) / D**0.5 if gated else None,
        "num_experts": E,
    }


def gradients(args):
    leaves = {k: v.detach().requires_grad_() for k, v in args.items() if torch.is_tensor(v) and v.is_floating_point()}
    with use("cpu"):
        y = expert_ffn(**(args | leaves))
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves.values())]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [3, 130])  # the path for few tokens, and the one with GEMMs
def test_the_number_of_threads_changes_no_bit(N, dtype):
    skip_without("cpu", dtype)
    args = arguments(N, 200, 320, 8, 3, dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad(), use("cpu"):
                y = expert_ffn(**args)
            results.append([y, *gradients(args)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_extension
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    """Widths about the 16 lanes of a register, numbers of tokens about the 64 of a chunk."""
    draw = data.draw
    kinds = [(torch.float32, 1), (torch.bfloat16, 2)]  # bf16: even widths
    dtype, pairs = draw(st.sampled_from([kind for kind in kinds if not refusal("cpu", kind[0])]))
    E, D = draw(st.integers(1, 5)), pairs * draw(st.sampled_from([1, 2, 15, 16, 17, 33, 100]))
    S = pairs * draw(st.sampled_from([1, 2, 15, 16, 17, 31, 300]))  # 300: more rows than one GEMM takes
    N = draw(st.sampled_from([0, 1, 4, 15, 17, 63, 65, 200, 530]))
    args = arguments(N, D, E * S, E, draw(st.integers(1, E)), dtype, gated=draw(st.booleans()))
    unused = torch.rand(args["experts_NK"].shape, generator=torch.Generator().manual_seed(1)) < 0.2
    args["experts_NK"][unused] = -1
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in args.items()}
    with use("reference"), torch.no_grad():
        expected = expert_ffn(**exact)
    with use("cpu"), torch.no_grad():
        y = expert_ffn(**args)
    trained = gradients(args)
    # bf16: 8 bits a number, and three roundings between x and dx; narrow layers average over little
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (y - expected).norm() <= tolerance * expected.norm() + 1e-30
    assert (trained[0] - expected).norm() <= tolerance * expected.norm() + 1e-30
    leaves = [v.requires_grad_() for v in exact.values() if torch.is_tensor(v) and v.is_floating_point()]
    with use("reference"):
        exact_gradients = torch.autograd.grad(expert_ffn(**exact).square().sum(), leaves)
    for actual, wanted in zip(trained[1:], exact_gradients, strict=True):
        assert (actual - wanted).norm() <= 2 * tolerance * wanted.norm() + 1e-30


@needs_extension
@pytest.mark.parametrize("E", [2, 64])  # experts of 2752 and of 86 neurons: large blocks, and a tail of every width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experts_are_the_dense_layer_at_real_widths(dtype, E):
    skip_without("cpu", dtype)
    args = arguments(70, 1032, 5504, E, E, dtype)
    with use("cpu"), torch.no_grad():
        y = expert_ffn(**args)
    w = {k: v.double() for k, v in args.items() if torch.is_tensor(v)}
    expected = linear(silu(linear(w["x_ND"], w["gate_FD"])) * linear(w["x_ND"], w["up_FD"]), w["down_DF"])
    rounded = linear(silu(linear(args["x_ND"], args["gate_FD"])) * linear(args["x_ND"], args["up_FD"]), args["down_DF"])
    error = lambda t: float((t - expected).norm() / expected.norm())  # noqa: E731
    assert error(y) <= (1e-5 if dtype == torch.float32 else error(rounded))


@needs_extension
def test_only_the_output_bias_or_down_wants_a_gradient():
    args = arguments(70, 24, 48, 6, 2, torch.float32) | {"down_bias_D": torch.zeros(24)}
    full = {}
    for names in (("down_DF",), ("down_bias_D",), ("x_ND", "up_FD", "gate_FD", "down_DF", "down_bias_D")):
        leaves = {k: args[k].detach().requires_grad_() for k in names}
        with use("cpu"):
            y = expert_ffn(**(args | leaves))
        full[names] = dict(zip(names, torch.autograd.grad(y.square().sum(), leaves.values()), strict=True))
    *single, everything = full.values()
    for found in single:
        for name, grad in found.items():
            assert torch.equal(grad, everything[name])


@needs_extension
def test_forward_mode_is_refused_not_zero():
    args = arguments(5, 24, 48, 6, 2, torch.float32)
    with use("cpu"), pytest.raises((NotImplementedError, RuntimeError), match=r"first derivatives|jvp"):
        torch.func.jvp(lambda x: expert_ffn(**(args | {"x_ND": x})), (args["x_ND"],), (args["x_ND"],))


@needs_extension
def test_operators_refuse_what_would_corrupt_memory():
    a = arguments(10, 24, 48, 6, 2, torch.float32)
    up, gate = a["up_FD"].unflatten(0, (6, 8)), a["gate_FD"].unflatten(0, (6, 8))
    down = a["down_DF"].unflatten(1, (6, 8)).permute(1, 0, 2)
    extension.load()
    good = [a["x_ND"], a["experts_NK"], up, down, gate, None, None, None, None, 0]
    torch.ops.emoe_cpu.forward(*good)
    for index, wrong in ((1, torch.zeros(400, 2).long()), (2, up.bfloat16()), (3, down[..., :2]), (9, 99)):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.emoe_cpu.forward(*good[:index], wrong, *good[index + 1 :])


@needs_extension
def test_torch_compile_traces_it_whole():
    args = arguments(40, 24, 48, 6, 2, torch.float32)
    expected = gradients(args)

    def loss(values):
        return expert_ffn(**(args | values)).square().sum()

    leaves = {k: v.detach().requires_grad_() for k, v in args.items() if torch.is_tensor(v) and v.is_floating_point()}
    with use("cpu"):
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves)
    for actual, wanted in zip(torch.autograd.grad(value, leaves.values()), expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted)


@needs_extension
def test_operators_pass_the_checks_of_torch_library():
    a = arguments(10, 24, 48, 6, 2, torch.float32)
    up, gate = a["up_FD"].unflatten(0, (6, 8)), a["gate_FD"].unflatten(0, (6, 8))
    down = a["down_DF"].unflatten(1, (6, 8)).permute(1, 0, 2)
    extension.load()
    call = (a["x_ND"], a["experts_NK"], up, down, gate, None, None, None, None, 0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.emoe_cpu.forward.default, call, test_utils=checks)
    torch.library.opcheck(torch.ops.emoe_cpu.forward_keep.default, call, test_utils=checks)
    _, up_pre, gate_pre = torch.ops.emoe_cpu.forward_keep(*call)
    grads = [torch.empty_like(t) for t in (a["x_ND"], up, down, gate)]
    call = (a["x_ND"], a["x_ND"], a["experts_NK"], up, down, gate, None, up_pre, gate_pre, 0, *grads, None, None, None)
    torch.library.opcheck(torch.ops.emoe_cpu.backward_into.default, call, test_utils=checks)
