"""The plan and the grouped linears of the Triton kernels; run by test_triton.py.

Legend: N tokens, K slots per token, E experts, S neurons per expert, D model width.
"""

import pytest
import torch

pytest.importorskip("triton")

from support.triton_ffn import DEVICE, SHAPES, TOLERANCE, assert_same, make, runs_kernels, with_grads

from emoe_kernels.experts.triton_op import expert_combine, expert_linear, plan_experts

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


@runs_kernels
@pytest.mark.parametrize("P, E", [(1, 1), (40, 5), (300, 3), (300, 130)])  # 128 slots a chunk
def test_the_plan_is_a_stable_sort(P, E):
    """Stable, so that sums over the rows of an expert are taken in the order of tokens."""
    ids = torch.randint(-1, E, (P, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets, slots = plan_experts(ids, E)
    keys = ids[:, 0].where(ids[:, 0] >= 0, E)  # unused slots last
    assert torch.equal(slots.long(), keys.sort(stable=True).indices)
    assert offsets.tolist() == [int((keys < e).sum()) for e in range(E + 1)]


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
