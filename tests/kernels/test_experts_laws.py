"""The laws that the sparse expert FFN obeys, whatever its arguments.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dtypes import skip_without
from support.expert_ffn import BIASES, FAST, assert_same, error, make, run, run_with_grads
from torch.nn.functional import linear

from emoe_kernels.experts import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


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
    skip_without(fast, dtype)
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
