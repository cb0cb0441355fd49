"""Arguments of `expert_ffn`, and how its implementations are run and compared.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

from __future__ import annotations

import torch

from emoe_kernels import extension, use
from emoe_kernels.experts import expert_ffn

FAST = ("portable", "cpu") if extension.status().available else ("portable",)
BIASES = ("up_bias_F", "gate_bias_F", "down_bias_D")


def choose(N, E, K, generator):
    return torch.rand(N, E, generator=generator).argsort(1)[:, :K]


def make(N, D, F, E, K, *, gated=True, biases=BIASES, weighted=True, dtype=torch.float32, seed=0):
    """Arguments of `expert_ffn`, scaled so that pre-activations and outputs are about 1."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    args = {
        "x_ND": randn(N, D),
        "experts_NK": choose(N, E, K, g),
        "up_FD": randn(F, D) / D**0.5,
        "down_DF": randn(D, F) / F**0.5,
        "gate_FD": randn(F, D) / D**0.5 if gated else None,
        "up_bias_F": randn(F),
        "gate_bias_F": randn(F) if gated else None,
        "down_bias_D": randn(D),
        "weights_NK": randn(N, K).abs() if weighted else None,
    }
    args.update({name: None for name in BIASES if name not in biases})
    args = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in args.items()}
    return args | {"num_experts": E}


def run(implementation, args, **changes):
    with use(implementation), torch.no_grad():
        return expert_ffn(**(args | changes))


def run_with_grads(implementation, args, **changes):
    """y and the gradient of every floating argument, for a fixed random dy."""
    args = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in (args | changes).items()}
    leaves = {k: v.requires_grad_() for k, v in args.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    with use(implementation):
        y = expert_ffn(**args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}


def error(actual, expected):
    """Norm of the difference over norm of the expected."""
    assert actual.shape == expected.shape
    difference, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert error(actual[name], expected[name]) <= tolerance, name  # also fails on NaN


def stack(args, view_rows=lambda w: w, view_columns=lambda w: w):
    """The same arguments with stacked weights, contiguous unless a view says otherwise."""
    E = args["num_experts"]
    stacked = {k: v for k, v in args.items() if k != "num_experts"}
    for name in ("up_FD", "gate_FD", "up_bias_F", "gate_bias_F"):
        if args[name] is not None:
            stacked[name] = args[name].unflatten(0, (E, -1)).contiguous()
    for name in ("up_FD", "gate_FD"):
        if args[name] is not None:
            stacked[name] = view_rows(stacked[name])
    return stacked | {"down_DF": view_columns(args["down_DF"].unflatten(1, (E, -1)).transpose(0, 1).contiguous())}
