"""Registers, stack and shared memory of the kernels of stick-breaking attention, compiled ahead of time without a GPU.

    python -m emoe_kernels.stickbreaking.triton_report [--arch sm80 sm90 gfx90a] [--json]

As `emoe_kernels.experts.triton_report` does it: the host code runs on meta tensors, and what it launches is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..experts.triton_launch import Launch, record
from ..experts.triton_report import TABLE_OF, Usage, compile_launch, main, resources, settings
from .triton_op import backward, forward

WIDTHS = {"half": (64, 128, 1024), "fp16": (), "tf32": (64, 1024), "ieee": (32, 1024)}
"""A by kind of arithmetic: one tile, and many, as in the released MoLM models; in 16 bits also that of common heads.
fp16 differs from bf16 in one letter of an instruction."""


def launches(arch: str, kind: str, dtype: torch.dtype) -> list[tuple[str, Launch]]:
    """(name, launch) of every kernel in every form: with a mask, which costs registers, and the current token."""
    found = []
    for A in WIDTHS[kind]:
        q = torch.empty(2, 8, 512, A, dtype=dtype, device="meta")
        k = torch.empty(2, 4, 512, A, dtype=dtype, device="meta")
        mask = torch.empty(2, 512, dtype=torch.bool, device="meta")
        arguments = (q, k, k, mask, True, A**-0.5)
        with record(TABLE_OF.get(arch, arch)) as recorded:
            forward(*arguments)
            backward(q, q[..., 0], *arguments)
        names = ("forward", "carry", "grad_query", "grad_key")
        found += [(f"{name} A {A}", launch) for name, launch in zip(names, recorded, strict=True)]
    return found


def report(archs: list[str], kinds: list[str] | None = None) -> Iterator[Usage]:
    """All kernels on these architectures, one after the other; `kinds` as in `emoe_kernels.experts.triton_report`."""
    for arch in archs:
        for kind, dtype in settings(arch):
            for name, launch in launches(arch, kind, dtype) if kinds is None or kind in kinds else ():
                compiled = compile_launch(launch, arch)
                tile = "x".join(str(launch.constants[size]) for size in ("BM", "BN", "WIDTH"))
                config = f"{tile} w{launch.warps} s{launch.stages}"
                yield Usage(arch, kind, name, config, *resources(compiled.asm), compiled.metadata.shared)


if __name__ == "__main__":
    main(report, __doc__)
