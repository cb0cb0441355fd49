"""Registers, stack and shared memory of every Triton kernel, compiled ahead of time: no GPU and no driver needed.

    python -m emoe_kernels.experts.triton_report [--arch sm80 sm90] [--json]

The host code runs on meta tensors while launches are recorded, so that what is compiled is what would be launched.
`ptxas` and `cuobjdump` come with Triton. A register that spills goes to the stack of the thread: STACK > 0, which
`cuobjdump -res-usage` tells; LOCAL stays 0 for spills.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_host as host
from .triton_common import INTERPRETING
from .triton_launch import Launch, record
from .triton_plan import make_plan

TARGETS = {"sm80": 80, "sm90": 90, "sm100": 100}
SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
"""Bytes of shared memory a program may have. sm80 itself grants 163 KiB; sm86 and sm89, served by its table, 99."""

TABLE_OF = {"sm100": "sm90"}
"""Architectures that use another's table of configurations."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Usage(NamedTuple):
    """What one compiled kernel takes."""

    arch: str
    dtype: str
    kernel: str
    config: str
    """BM x BN x BK, warps, stages."""
    registers: int
    """Of each thread, at most 255."""
    stack: int
    """Bytes of each thread; more than 0 means spilled registers."""
    local: int
    shared: int
    """Bytes of each program."""


def compile_launch(launch: Launch, arch: str):
    """The recorded launch compiled for `arch`, with what the launcher would have told the compiler: pointers and
    integers divisible by 16 are known to be."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = "i32"
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, {n: signature[n] for n in names}, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", TARGETS[arch], 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """{"REG": ..., "STACK": ..., "LOCAL": ...} of the only kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}


def name_of(launch: Launch) -> str:
    """As in the table of configurations; "columns" where a weight or gradient lies transposed in the dense matrix."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    if launch.kernel is host.hidden_kernel and launch.args[2] is None:
        name = "linear"
    columns = launch.constants.get("UP_D", launch.constants.get("G_D", 1)) != 1
    return name + " columns" * columns


def measure(launch: Launch, arch: str, dtype: str) -> Usage:
    """Compile one launch and read off what it takes."""
    compiled = compile_launch(launch, arch)
    used = resources(compiled.asm["cubin"])
    tile = [launch.constants[k] for k in ("BM", "BN", "BK") if k in launch.constants]
    config = f"{'x'.join(map(str, tile))} w{launch.warps} s{launch.stages}"
    return Usage(
        arch, dtype, name_of(launch), config, used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared
    )


def _layer(N: int, D: int, S: int, E: int, K: int, dtype: torch.dtype, activation: str) -> None:
    """Launch all that a gated layer with biases and weights needs, forward and backward; the most any kernel can do."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    P = N * K
    x, weights, experts = empty(N, D), empty(N, K, dtype=torch.float32), empty(N, K, dtype=torch.int64)
    plan = make_plan(experts, E)
    up, gate = (empty(E * S, D).unflatten(0, (E, S)) for _ in range(2))
    down_ESD = empty(D, E * S).unflatten(1, (E, S)).permute(1, 2, 0)
    bias, bias_D = empty(E, S), empty(D)
    h, u, g, du, dg, hw = (host.padded_rows(x, P, S) for _ in range(6))
    host.hidden(x, plan, K, up, gate, bias, bias, h, u, g, activation, by_slot=False)
    host.hidden(x, plan, K, down_ESD, None, bias, None, h, u, None, activation, by_slot=False)  # as GPT-2 keeps up
    host.project(h, down_ESD, None, None, experts, plan, weights, bias_D, by_slot=False)
    host.hidden(x, plan, K, down_ESD, None, None, None, du, None, None, "none", by_slot=False)
    dw = empty(P, dtype=torch.float32)
    host.activation_backward(plan, E, S, weights, du, u, g, dg, hw, dw, activation, by_slot=False, write_du=True)
    host.project(du, up, dg, gate, experts, plan, None, None, by_slot=False)
    host.grad_weight(du, x, torch.empty_like(up), plan, K, by_slot=False)
    host.grad_weight(hw, x, torch.empty_like(down_ESD), plan, K, by_slot=False)
    host.grad_bias(du, E, S, plan, by_slot=False)


# N, D, S, E, K: widths of Llama 7B and of a narrow model, and rows per expert for every height of the table
SHAPES = [(N, 4096, S, 64, 16) for S in (172, 88, 2048) for N in (8, 128, 256, 2048)]


def launches(arch: str, dtype: torch.dtype) -> list[Launch]:
    """For every kernel and configuration of the table the launch of its most demanding forms.

    gelu has the longest epilogue; `project` is taken with two operands; gradients of weights both as rows and as
    columns of a dense matrix.
    """
    found = {}
    with record(TABLE_OF.get(arch, arch)) as recorded:
        for shape in SHAPES:
            _layer(*shape, dtype, "gelu")
    for launch in recorded:
        if launch.kernel is host.project_kernel and launch.args[2] is None:
            continue
        tile = tuple(launch.constants.get(k) for k in ("BM", "BN", "BK"))
        found.setdefault((name_of(launch), *tile, launch.warps, launch.stages), launch)
    return list(found.values())


def _settings() -> Iterator[tuple[str, torch.dtype]]:
    """The kinds of arithmetic, each with the dtype that leads to it and torch's switch in its position."""
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for kind, dtype in (("half", torch.bfloat16), ("tf32", torch.float32), ("ieee", torch.float32)):
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            yield kind, dtype
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def report(archs: list[str]) -> Iterator[Usage]:
    """Everything that the table can launch on these architectures, compiled one after the other: 0.4 s a kernel."""
    for arch in archs:
        seen = set()
        for kind, dtype in _settings():
            for launch in launches(arch, dtype):
                # without tiles of a GEMM a kernel depends on the dtype alone, and the plan's not even on that
                about = kind if "BK" in launch.constants else _TYPES[launch.args[0].dtype]
                if about == kind or (launch.kernel, about) not in seen:
                    yield measure(launch, arch, about)
                seen.add((launch.kernel, about))


_LINE = "{:6}{:6}{:22}{:22}{:>9}{:>7}{:>12}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=["sm80", "sm90"])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if INTERPRETING:
        sys.exit("TRITON_INTERPRET=1 is set: there is nothing to compile. Unset it.")
    if not args.json:
        print(_LINE.format("arch", "type", "kernel", "tile, warps, stages", "registers", "stack", "shared KiB"))
    for usage in report(args.arch):
        if args.json:
            print(json.dumps(usage._asdict()), flush=True)
            continue
        print(_LINE.format(*usage[:6], round(usage.shared / 1024, 1)), flush=True)


if __name__ == "__main__":
    main()
