"""Measure launch configurations on the GPU at hand: `tune`, the optional step before training for days.

Legend: N tokens, K experts chosen per token, E experts, S neurons per expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from triton.testing import do_bench

from . import triton_configs as configs
from .portable import stack_columns, stack_rows
from .triton_ffn import expert_ffn


def variations(tiles: tuple[configs.Config, ...]) -> Iterator[configs.Config]:
    """The table's tiles first, then each of them with other widths, depths, warps and stages."""
    seen = set()
    for change in (
        {},
        *({"bn": bn} for bn in (32, 64, 128)),
        *({"bk": bk} for bk in (32, 64)),
        *({"warps": warps} for warps in (4, 8)),
        *({"stages": stages} for stages in (2, 3, 4, 5)),
    ):
        for tile in tiles:
            tile = tile._replace(**change)
            if tile not in seen:
                seen.add(tile)
                yield tile


def milliseconds(step: Callable[[], object]) -> float:
    """Median time of a step on the GPU."""
    return do_bench(step, return_mode="median")


def tune(
    N: int,
    D: int,
    S: int,
    E: int,
    K: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = True,
    transposed: bool = False,
    activation: str = "silu",
    device: str = "cuda",
) -> dict[str, configs.Config]:
    """Time a layer of this size, forward and backward, with balanced random routing, one kernel's tile after another.

    Weights lie as in a dense checkpoint, `transposed` as in GPT-2's (Conv1D): which neighbours are neighbours in memory
    decides how a kernel reads them, so a kernel is timed for each layout in which the layer needs it.

    Writes the fastest into the user's cache (`triton_configs.cache_path`), where every later process finds them, and
    returns them. Tiles that do not fit the GPU are passed over. Minutes, nearly all of them for compiling.
    """
    g = torch.Generator(device).manual_seed(0)

    def leaf(*shape: int, scale: float) -> torch.Tensor:
        values = torch.randn(*shape, generator=g, device=device) * scale
        return values.to(dtype).requires_grad_()

    x, weights = leaf(N, D, scale=1.0), leaf(N, K, scale=1.0)
    experts = torch.rand(N, E, generator=g, device=device).argsort(1)[:, :K]
    F, swap = E * S, -1 if transposed else 1
    up, gate = (leaf(*(F, D)[::swap], scale=D**-0.5) if wanted else None for wanted in (True, gated))
    down = leaf(*(D, F)[::swap], scale=S**-0.5)
    leaves = [t for t in (x, weights, up, gate, down) if t is not None]
    dy = torch.randn(N, D, generator=g, device=device).to(dtype)

    def stack(weight_FD: torch.Tensor) -> torch.Tensor:
        return stack_columns(weight_FD, E).transpose(1, 2) if transposed else stack_rows(weight_FD, E)

    def step() -> None:
        down_EDS = stack_rows(down, E).transpose(1, 2) if transposed else stack_columns(down, E)
        gate_ESD = stack(gate) if gated else None
        y = expert_ffn(x, experts, stack(up), down_EDS, gate_ESD=gate_ESD, activation=activation, weights_NK=weights)
        torch.autograd.grad(y, leaves, dy)

    arch, kind = configs.architecture(x.device), configs.arithmetic(dtype)
    device, height = configs.device_name(x.device), configs.rows_per_block(N * K, E)
    up_layout, down_layout = ("rows", "columns")[::swap]
    kernels = [("hidden" if gated else "linear", up_layout), ("linear", down_layout)]
    kernels += [(name, layout) for name in ("project", "grad_weight") for layout in (up_layout, down_layout)]
    own, found = configs.user_configs(), {}
    for kernel, layout in kernels:
        key = str(configs.Case(device, kind, kernel, height, S, D, layout))
        before, times = own.get(key), {}
        try:
            for tile in variations(configs.candidates(arch, kind, kernel, height)):
                own[key] = tile  # the dictionary that `choose` looks into
                try:
                    times[tile] = milliseconds(step)
                except Exception:  # out of shared memory or registers, or a tile the compiler rejects
                    continue
        finally:
            if before is None:
                own.pop(key, None)
            else:
                own[key] = before
        if times:
            found[key] = own[key] = min(times, key=times.get)
    configs.save(found)
    return found
