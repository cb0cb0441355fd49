"""What is measured: shapes, tokens, routings, weights, and the reference that every implementation is held to.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from emoe_kernels import use
from emoe_kernels.experts import expert_ffn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("fwd", "fwdbwd")
"""fwd: forward without a graph. fwdbwd: forward, and one backward from a fixed dy to x and every weight."""

SHAPES = ((576, 1536), (2048, 5632), (4096, 11008))
"""(D, F) of SmolLM2-135M, TinyLlama-1.1B and Llama-2-7B."""
TOKENS = (1, 8, 64, 512, 2048)
FRACTIONS = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))
"""K / E."""
EXPERTS = 64

ROUTINGS = 4
"""Routings that the rounds of a case take turns with; one would keep the same experts in the cache at N = 1."""


class CaseError(ValueError):
    """Input that the user can put right."""


class Shape(NamedTuple):
    """One FFN and how many of its experts a token uses."""

    width: int
    """D."""
    hidden: int
    """F."""
    experts: int
    """E, a divisor of F."""
    chosen: int
    """K."""

    @property
    def neurons(self) -> int:
        """S, neurons per expert."""
        return self.hidden // self.experts

    @property
    def ideal(self) -> float:
        """K / E: the sparse layer's share of the dense layer's arithmetic."""
        return self.chosen / self.experts

    def __str__(self) -> str:
        return f"({self.width}, {self.hidden}) {self.experts} × {self.neurons}, K {self.chosen}"


class Case(NamedTuple):
    """One line of the grid: everything but the implementation."""

    shape: Shape
    tokens: int
    dtype: str
    pass_: str

    def __str__(self) -> str:
        return f"{self.shape}, N {self.tokens}, {self.dtype} {self.pass_}"


def make_shape(width: int, hidden: int, experts: int, fraction: Fraction) -> Shape:
    """The shape at K = fraction * E. CaseError where E does not divide F or K is no whole number of experts."""
    if hidden % experts:
        raise CaseError(f"--shape {width}x{hidden}: F={hidden} is not divisible by --experts {experts}")
    chosen = fraction * experts
    if chosen.denominator != 1 or not 1 <= chosen <= experts:
        raise CaseError(f"--fraction {fraction}: {fraction} of {experts} experts is not a number from 1 to {experts}")
    return Shape(width, hidden, experts, int(chosen))


class Traces(NamedTuple):
    """Experts that a converted model chose on real text, as `scripts/router_traces.py` writes them."""

    name: str
    width: int
    hidden: int
    experts: int
    layers: dict[int, list[Tensor]]
    """Per K: one (T, K) tensor of expert ids a layer, T consecutive tokens."""

    def windows(self, tokens: int, chosen: int) -> list[Tensor]:
        """`ROUTINGS` windows of consecutive tokens, from layers spread evenly over the depth of the model.

        A batch of N tokens is N neighbours in one text, as in prefill or speculative decoding; they agree on experts
        more often than tokens of N unrelated sequences would.
        """
        layers = self.layers[chosen]
        length = len(layers[0])
        if tokens > length:
            raise CaseError(f"--tokens {tokens}: the trace {self.name} holds {length}")
        windows = []
        for i in range(ROUTINGS):
            layer = layers[(2 * i + 1) * len(layers) // (2 * ROUTINGS)]
            start = (length - tokens) * (i + 1) // (ROUTINGS + 1)
            windows.append(layer[start : start + tokens].long())
        return windows


def read_traces(path: Path) -> Traces:
    """Read a trace file. CaseError if it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["router_traces"])
            layers = {k: [file.get_tensor(f"k{k}.layer{i}") for i in facts["layers"]] for k in facts["top_k"]}
    except FileNotFoundError:
        raise CaseError(f"--routing: {path} does not exist") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CaseError(
            f"--routing: {path} is not a file of router traces ({type(error).__name__}); "
            "scripts/router_traces.py writes them"
        ) from None
    return Traces(path.name, facts["width"], facts["hidden"], facts["experts"], layers)


def random_routing(tokens: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """(N, K) distinct experts, uniform: balanced on average, the worst case for locality."""
    return torch.rand(tokens, shape.experts, generator=generator).argsort(1)[:, : shape.chosen].contiguous()


def union_of(experts_NK: Tensor) -> int:
    """How many experts at least one of the tokens uses."""
    return int(experts_NK.unique().numel())


class DenseWeights(NamedTuple):
    """The checkpoint's layout; leaves that require gradients."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


class StackedWeights(NamedTuple):
    """transformers' layout of the same numbers: an expert is an index. Leaves that require gradients."""

    gate_up_E2D: Tensor
    """(E, 2 S, D): gate above up."""
    down_EDS: Tensor


@dataclass
class Layer:
    """One gated FFN in one dtype, in both layouts; the stacked copy is made when first asked for."""

    dense: DenseWeights
    num_experts: int

    @cached_property
    def stacked(self) -> StackedWeights:
        """A copy: made outside of every timing."""
        E = self.num_experts
        gate_FD, up_FD, down_DF = (w.detach() for w in self.dense)
        gate_up = torch.cat([gate_FD.unflatten(0, (E, -1)), up_FD.unflatten(0, (E, -1))], dim=1)
        down = down_DF.unflatten(1, (E, -1)).transpose(0, 1).contiguous()
        return StackedWeights(torch.nn.Parameter(gate_up), torch.nn.Parameter(down))

    def drop_gradients(self) -> None:
        """Set them to None in both layouts."""
        for leaf in (*self.dense, *self.__dict__.get("stacked", ())):
            leaf.grad = None


def _rounded(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    """Normal fp32 numbers that bf16 holds exactly, so that both dtypes share weights, inputs and one reference."""
    return torch.randn(shape, generator=generator).mul_(scale).bfloat16().float()


def make_weights(width: int, hidden: int, seed: int) -> DenseWeights:
    """fp32 weights that keep pre-activations and outputs near 1."""
    g = torch.Generator().manual_seed(seed)
    gate_FD, up_FD = (_rounded((hidden, width), width**-0.5, g) for _ in range(2))
    return DenseWeights(gate_FD, up_FD, _rounded((width, hidden), hidden**-0.5, g))


def make_layer(weights: DenseWeights, num_experts: int, dtype: str) -> Layer:
    """The weights in that dtype, as leaves."""
    return Layer(DenseWeights(*(torch.nn.Parameter(w.to(DTYPES[dtype])) for w in weights)), num_experts)


class Inputs(NamedTuple):
    """What a case feeds to every implementation; fp32 tensors, to be cast to the dtype of the case."""

    x_ND: Tensor
    dy_ND: Tensor
    routings: list[Tensor]
    """(N, K) each; the rounds take turns, the check uses the first."""

    @property
    def union(self) -> float:
        """Distinct experts of a routing, mean over the routings."""
        return round(sum(map(union_of, self.routings)) / len(self.routings), 1)


def make_inputs(shape: Shape, tokens: int, seed: int, traces: Traces | None) -> Inputs:
    """Tokens, output gradient and routings of a case; the same for both dtypes and passes."""
    g = torch.Generator().manual_seed(seed + 1)
    x_ND, dy_ND = (_rounded((tokens, shape.width), 1.0, g) for _ in range(2))
    if traces is not None:
        return Inputs(x_ND, dy_ND, traces.windows(tokens, shape.chosen))
    return Inputs(x_ND, dy_ND, [random_routing(tokens, shape, g) for _ in range(ROUTINGS)])


class Reference(NamedTuple):
    """What the equation gives in fp32; gradients None where no backward pass is asked for."""

    y_ND: Tensor
    gradients: dict[str, Tensor] | None
    """Keys x, gate, up, down, in the dense layout."""


def reference(weights: DenseWeights, inputs: Inputs, num_experts: int, gradients: bool) -> Reference:
    """`emoe_kernels`' reference, dense and in fp32, on the first routing."""
    leaves = [t.detach().requires_grad_(gradients) for t in (inputs.x_ND, *weights)]
    x_ND, gate_FD, up_FD, down_DF = leaves
    with use("reference"), torch.set_grad_enabled(gradients):
        y_ND = expert_ffn(x_ND, inputs.routings[0], up_FD, down_DF, num_experts=num_experts, gate_FD=gate_FD)
        if not gradients:
            return Reference(y_ND, None)
        found = torch.autograd.grad(y_ND, leaves, inputs.dy_ND)
    return Reference(y_ND.detach(), dict(zip(("x", "gate", "up", "down"), found, strict=True)))


def grid(shapes: list[Shape], tokens: list[int], dtypes: list[str], passes: list[str]) -> Iterator[Case]:
    """Cases in the order that shares weights, then inputs and reference, between neighbours."""
    for shape in shapes:
        for n in tokens:
            for dtype in dtypes:
                for pass_ in passes:
                    yield Case(shape, n, dtype, pass_)
