"""What the sparse expert FFN refuses, and its file that travels with checkpoints.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch
from support.expert_ffn import make, run, run_with_grads, stack

from emoe_kernels.experts import portable

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


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
