"""Around the Triton kernels: errors, who may call them, the public functions, tuning; run by test_triton.py.

Legend: N tokens, K slots per token, E experts, S neurons per expert, D model width.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from support.triton_ffn import (
    DEVICE,
    INTERPRETED,
    NAMES,
    TOLERANCE,
    assert_same,
    call,
    expected_ffn,
    ffn_with_grads,
    make,
    runs_kernels,
    with_grads,
)

import emoe_kernels.experts
import emoe_kernels.linear
from emoe_kernels import dispatch, use
from emoe_kernels.experts import triton_configs as configs
from emoe_kernels.experts import triton_host as host
from emoe_kernels.experts import triton_tune
from emoe_kernels.experts.triton_op import expert_combine, expert_ffn, expert_linear, plan_experts, supports

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


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


@pytest.mark.skipif(INTERPRETED, reason="asks nothing of the interpreter")
def test_importing_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import emoe_kernels.experts"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
