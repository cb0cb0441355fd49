"""One place through which every Triton kernel of the experts is launched, or recorded instead.

Recording lets `triton_report.py` run the host code on meta tensors and compile ahead of time exactly what would have
been launched: there is no second list of signatures to keep in step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .triton_common import INTERPRETING

HIP_STAGES = 2
"""At most so many on AMD: 64 KiB of shared memory, and no asynchronous copies to keep in flight."""


class Launch(NamedTuple):
    kernel: Any
    """A function under `triton.jit`."""
    programs: int
    args: tuple
    """Positional arguments: tensors, integers or None."""
    constants: dict[str, Any]
    """Compile-time arguments by name."""
    warps: int
    stages: int


class Recorder(NamedTuple):
    arch: str
    """Row of the configuration table to pretend to be."""
    launches: list[Launch]


_recorder: ContextVar[Recorder | None] = ContextVar("emoe_triton_recorder", default=None)


@contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Within it nothing runs: launches are appended to the list it gives, with configurations of `arch`."""
    recorder = Recorder(arch, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def recorded_arch() -> str | None:
    """The architecture recorded for, or None where launches are real."""
    recorder = _recorder.get()
    return None if recorder is None else recorder.arch


def check_device(device: torch.device) -> None:
    """ValueError where Triton cannot run."""
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETING) or _recorder.get() is not None:
        return
    hint = " (TRITON_INTERPRET=1 must be set before Triton is imported)" if device.type == "cpu" else ""
    raise ValueError(f"the Triton kernels need a GPU, but the tensors are on {device}{hint}")


def launch(kernel: Any, programs: int, args: tuple, constants: dict[str, Any], *, warps: int = 4, stages: int = 1):
    """Run `programs` programs of `kernel`, on the device of its tensors."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, programs, args, constants, warps, stages))
    elif programs > 0:
        if torch.version.hip is not None:
            stages = min(stages, HIP_STAGES)
        device = next(arg for arg in args if isinstance(arg, torch.Tensor)).device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
