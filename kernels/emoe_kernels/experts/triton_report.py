"""Registers, stack and shared memory of every Triton kernel, compiled ahead of time: no GPU and no driver needed.

    python -m emoe_kernels.experts.triton_report [--arch sm80 sm90 gfx90a] [--json]

The host code runs on meta tensors while launches are recorded, so that what is compiled is what would be launched.
All compilers come with Triton (3.4 or newer, for this file). A register that spills goes to the stack of the thread: on
NVIDIA STACK > 0, which `cuobjdump -res-usage` tells (LOCAL stays 0 for spills), on AMD a private segment.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_host as host
from .triton_common import INTERPRETING
from .triton_launch import HIP_STAGES, Launch, record
from .triton_plan import make_plan

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_KIB = {"sm80": 99, "sm90": 227, "sm100": 227, "sm120": 99, "gfx90a": 64, "gfx942": 64}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in _KIB.items()}
"""Bytes of shared memory a program may have. sm80 itself grants 163 KiB; sm86 and sm89, served by its table, 99."""

TABLE_OF = {"sm100": "sm90", "sm120": "sm80", "gfx90a": "sm80", "gfx942": "sm80"}
"""Architectures that use another's table of configurations, as `triton_configs.architecture` has it."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Usage(NamedTuple):
    """What one compiled kernel takes."""

    arch: str
    dtype: str
    kernel: str
    config: str
    """BM x BN x BK, warps, stages."""
    registers: int
    """Of each thread; at most 255 on NVIDIA, 512 on AMD."""
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
            if value % 16 == 0 and not launch.kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, {n: signature[n] for n in names}, constants, attributes)
    target = TARGETS[arch]
    stages = min(launch.stages, HIP_STAGES) if target.backend == "hip" else launch.stages
    options = {"num_warps": launch.warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def resources(asm: dict) -> tuple[int, int, int]:
    """Registers, stack and local memory of a compiled kernel."""
    if "amdgcn" in asm:
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): *(\d+)", asm["amdgcn"]))
        return int(found["vgpr_count"]), int(found["private_segment_fixed_size"]), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    used = {name: int(value) for name, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
    return used["REG"], used["STACK"], used["LOCAL"]


def name_of(launch: Launch) -> str:
    """As in the table of configurations, and then the form: a launch with other pointers or strides is another kernel.

    pair: a sum of two products. columns: the weight or gradient lies transposed in the dense matrix, as down does, or
    all of them in GPT-2. by slot: (P, S) tensors in the order of slots, for the grouped linears. wide: 64-bit offsets.
    """
    name, constants = launch.kernel.__name__.removesuffix("_kernel"), launch.constants
    if launch.kernel is host.hidden_kernel and launch.args[2] is None:
        name = "linear"
    stride = next((constants[key] for key in ("UP_D", "WA_D", "G_D") if key in constants), 1)
    forms = {
        "pair": launch.kernel is host.project_kernel and launch.args[2] is not None,
        "columns": stride != 1,
        "by slot": constants.get("BY_SLOT", False),
        "wide": "G_D" not in constants and stride * constants.get("D", 0) >= 2**31,
    }
    return " ".join([name, *(form for form, here in forms.items() if here)])


def measure(launch: Launch, arch: str, dtype: str) -> Usage:
    """Compile one launch and read off what it takes."""
    compiled = compile_launch(launch, arch)
    registers, stack, local = resources(compiled.asm)
    tile = [launch.constants[k] for k in ("BM", "BN", "BK") if k in launch.constants]
    config = f"{'x'.join(map(str, tile))} w{launch.warps} s{launch.stages}"
    return Usage(arch, dtype, name_of(launch), config, registers, stack, local, compiled.metadata.shared)


def _layers(N: int, D: int, S: int, E: int, K: int, dtype: torch.dtype, rare: bool) -> None:
    """Launch all that layers of this size need, forward and backward, with all options: the most a kernel can do.

    gelu has the longest epilogue. `rare` adds gated Conv1D layers and the grouped linears.
    """

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    P = N * K
    x, weights, experts = empty(N, D), empty(N, K, dtype=torch.float32), empty(N, K, dtype=torch.int64)
    plan = make_plan(experts, E)
    rows = empty(E * S, D).unflatten(0, (E, S))
    columns = empty(D, E * S).unflatten(1, (E, S)).permute(1, 2, 0)
    bias, bias_D = empty(E, S), empty(D)
    h, u, g, du, dg, hw = (host.padded_rows(x, P, S) for _ in range(6))
    dw = empty(P, dtype=torch.float32)

    host.hidden(x, plan, K, rows, rows, bias, bias, h, u, g, "gelu", by_slot=False)
    if rare:
        host.hidden(x, plan, K, columns, columns, bias, bias, h, u, g, "gelu", by_slot=False)
    for weight in (rows, columns):
        host.hidden(x, plan, K, weight, None, bias, None, h, u, None, "gelu", by_slot=False)
        host.project(h, weight, None, None, experts, plan, weights, bias_D, by_slot=False)
        host.grad_weight(hw, x, torch.empty_like(weight), plan, K, by_slot=False)
        if rare or weight is rows:
            host.project(du, weight, dg, weight, experts, plan, None, None, by_slot=False)
        if rare:
            host.hidden(x, plan, K, weight, None, bias, None, h, None, None, "none", by_slot=True)
            host.project(h, weight, None, None, experts, plan, weights, bias_D, by_slot=True)
            host.grad_weight(hw, x, torch.empty_like(weight), plan, K, by_slot=True)
    for by_slot in (False, True)[: 1 + rare]:
        gate = (None, None) if by_slot else (g, dg)
        activation = "none" if by_slot else "gelu"
        host.activation_backward(plan, E, S, weights, du, u, *gate, hw, dw, activation, by_slot=by_slot, write_du=True)
        host.grad_bias(du, E, S, plan, by_slot=by_slot)


# N, D, S, E, K: widths of Llama 7B and of a narrow model, and rows per expert for every height of the table
SHAPES = [(N, 4096, S, 64, 16) for S in (172, 88, 2048) for N in (8, 128, 256, 2048)]
_WIDE = (2048, 16384, 2048, 64, 16)
"""Dense matrices of 2**31 entries."""


def launches(arch: str, dtype: torch.dtype) -> list[Launch]:
    """For every kernel and configuration of the table the launch of each common form.

    Rare forms (`_layers`) and 64-bit offsets are there in bf16 with the tallest tiles only, which need most registers;
    fp16, which differs from bf16 in one letter of an instruction, in common forms with the tallest tiles.
    """
    found = {}
    with record(TABLE_OF.get(arch, arch)) as recorded:
        for shape in SHAPES if dtype != torch.float16 else SHAPES[-1:]:
            _layers(*shape, dtype, rare=shape == SHAPES[-1] and dtype == torch.bfloat16)
    if dtype == torch.bfloat16:
        with record(TABLE_OF.get(arch, arch)) as wide:
            _layers(*_WIDE, dtype, rare=True)
        recorded += [launch for launch in wide if name_of(launch).endswith(" columns wide")]
    for launch in recorded:
        tile = tuple(launch.constants.get(k) for k in ("BM", "BN", "BK"))
        found.setdefault((name_of(launch), *tile, launch.warps, launch.stages), launch)
    return list(found.values())


def settings(arch: str) -> Iterator[tuple[str, torch.dtype]]:
    """The kinds of arithmetic, each with the dtype that leads to it and torch's switch in its position."""
    before = torch.backends.cuda.matmul.allow_tf32
    kinds = {"half": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
    if TARGETS[arch].backend == "hip":
        del kinds["tf32"]
    try:
        for kind, dtype in kinds.items():
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            yield kind, dtype
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def report(archs: list[str], kinds: list[str] | None = None) -> Iterator[Usage]:
    """All that the table can launch on these architectures, compiled one after the other: 0.4 s a kernel.

    `kinds`: only these kinds of arithmetic ("half" is bf16 on tensor cores).
    """
    for arch in archs:
        seen = set()
        for kind, dtype in settings(arch):
            for launch in launches(arch, dtype) if kinds is None or kind in kinds else ():
                # without tiles of a GEMM a kernel depends on the dtype alone, and the plan's not even on that
                about = kind if "BK" in launch.constants else _TYPES[launch.args[0].dtype]
                if about == kind or (name_of(launch), about) not in seen:
                    yield measure(launch, arch, about)
                seen.add((name_of(launch), about))


_LINE = "{:8}{:6}{:30}{:22}{:>9}{:>7}{:>12}"


def main(report: Callable[[list[str], list[str] | None], Iterator[Usage]] = report, about: str = __doc__) -> None:
    """The command line, for the report of any kernels."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=["sm80", "sm90"])
    parser.add_argument("--kind", nargs="+", choices=["half", "fp16", "tf32", "ieee"], help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if INTERPRETING:
        sys.exit("TRITON_INTERPRET=1 is set: there is nothing to compile. Unset it.")
    if not args.json:
        print(_LINE.format("arch", "type", "kernel", "tile, warps, stages", "registers", "stack", "shared KiB"))
    for usage in report(args.arch, args.kind):
        if args.json:
            print(json.dumps(usage._asdict()), flush=True)
            continue
        print(_LINE.format(*usage[:6], round(usage.shared / 1024, 1)), flush=True)


if __name__ == "__main__":
    main()
