"""Arguments of the Triton ops, the equation in fp64, and how both are run and compared.

Legend: N tokens, K slots per token, E experts, S neurons per expert, D model width.
"""

from __future__ import annotations

import os

import pytest
import torch
from support.expert_ffn import error

from emoe_kernels.experts import ACTIVATIONS
from emoe_kernels.experts.triton_op import expert_ffn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 8e-3}
"""Norm of the difference over norm of the expected: sums in another order; 16-bit hidden values and gradients. The
interpreter cuts bf16 off where hardware rounds, which makes 0.015 of 0.004."""

runs_kernels = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu


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


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name]) for name in expected}
    print(max(errors.values()), errors)
    assert all(e <= tolerance for e in errors.values()), errors  # also fails on NaN


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
