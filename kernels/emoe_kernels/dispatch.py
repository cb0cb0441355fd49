"""Which implementation of the kernels runs, and why.

The innermost `with use(name):` decides; outside of any, the environment variable EMOE_KERNELS; without that, "auto":
on a GPU Triton, on a CPU the C++ extension, and the portable path where these are not to be had.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import NamedTuple

IMPLEMENTATIONS = ("reference", "portable", "cpu", "triton")
"""reference: the equation, dense. portable: sparse, in PyTorch alone, any device. cpu: a C++ extension, compiled on
first use. triton: GPU kernels."""

AUTO = "auto"
"""The fastest implementation that runs here."""

ENVIRONMENT_VARIABLE = "EMOE_KERNELS"

_chosen: ContextVar[str | None] = ContextVar("emoe_kernels_implementation", default=None)


def _check(name: str, source: str) -> str:
    known = (*IMPLEMENTATIONS, AUTO)
    if name not in known:
        raise ValueError(f"{source}={name!r} is not an implementation; known: {', '.join(known)}")
    return name


class _Use:
    def __init__(self, name: str) -> None:
        self.name = name
        self._tokens: list[Token] = []  # a stack, so that one object may be entered again within itself

    def __enter__(self) -> _Use:
        self._tokens.append(_chosen.set(self.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _chosen.reset(self._tokens.pop())


def use(name: str) -> AbstractContextManager:
    """Within `with use("reference"):` that implementation runs. Contexts nest; the innermost one decides.

    Held in a context variable: threads and asyncio tasks do not disturb each other, and a new thread starts with the
    default. A backward pass belongs to the implementation that ran forward, and a compiled function to the one that
    was chosen when `torch.compile` traced it. ValueError for an unknown name, raised by this call and not by entering.
    """
    return _Use(_check(name, "name"))


class Choice(NamedTuple):
    """An implementation, and why it is that one."""

    name: str
    """One of `IMPLEMENTATIONS`."""
    reason: str
    """One line, for people."""


_settled: dict[tuple[str, str], Choice] = {}
"""(what was asked for, device type) → what runs. Neither compilers nor packages come and go within a process."""


def requested() -> str:
    """The name that `use` or EMOE_KERNELS asks for, else "auto".

    ValueError if EMOE_KERNELS holds an unknown name; empty counts as unset.
    """
    name = _chosen.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
        if name != AUTO:
            _check(name, ENVIRONMENT_VARIABLE)
    return name


def resolve(device_type: str = "cpu") -> str:
    """The name of the implementation that runs now on tensors of a device type such as "cpu" or "cuda".

    Compiles the C++ extension if it is wanted and has not been compiled yet. ValueError for a name in EMOE_KERNELS
    that is unknown or cannot run on this device; RuntimeError if the extension was asked for and cannot be had.
    """
    wanted = requested()
    choice = _settled.get((wanted, device_type))
    if choice is None:
        choice = _settled[wanted, device_type] = _decide(wanted, device_type, may_build=True)
    return choice.name


# torch.compile calls these while it traces and takes the answer as a constant: it cannot trace context variables. What
# torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes seconds.
resolve._dynamo_marked_constant = requested._dynamo_marked_constant = True


def explain(device_type: str = "cpu") -> Choice:
    """What `resolve` answers, and why; raises what it raises, but compiles nothing.

    For an extension that would be compiled on first use this says so; whether the compiler then succeeds is known
    only afterwards.
    """
    wanted = requested()
    return _settled.get((wanted, device_type)) or _decide(wanted, device_type, may_build=False)


def _decide(wanted: str, device_type: str, may_build: bool) -> Choice:
    """The rules. A name that was asked for runs or raises; "auto" falls back to `portable`."""
    if wanted in ("reference", "portable"):
        return Choice(wanted, "it was asked for")
    fast = wanted if wanted != AUTO else {"cuda": "triton", "cpu": "cpu"}.get(device_type)
    if fast is None:
        return Choice("portable", f"there are no faster kernels for {device_type} devices")
    available, detail = _cpu(device_type, may_build) if fast == "cpu" else _triton(device_type)
    if available:
        return Choice(fast, detail if wanted == AUTO else f"it was asked for; {detail}")
    if wanted == AUTO:
        return Choice("portable", detail)
    error = RuntimeError if (fast, device_type) == ("cpu", "cpu") else ValueError
    raise error(f"the implementation {fast!r} was asked for on {device_type}: {detail}")


def _cpu(device_type: str, may_build: bool) -> tuple[bool, str]:
    if device_type != "cpu":
        return False, "the C++ extension computes on CPU tensors only"
    try:
        from . import extension
    except ImportError as error:
        return False, f"there is no C++ extension ({error})"
    if may_build and not extension.load():
        return False, extension.status().detail
    status = extension.status()
    return status.available, status.detail


_too_old: dict[int, str | None] = {}
"""Index of a GPU → what `gpu_too_old` answered."""


def gpu_too_old(index: int) -> str | None:
    """Why the Triton kernels cannot run on this GPU, or None. AMD has no such number, and there may be no GPU."""
    if index not in _too_old:
        import torch

        _too_old[index] = None
        if torch.cuda.is_available() and torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(index)
            if major < 8:
                _too_old[index] = f"the Triton kernels need compute capability 8.0 (Ampere), not {major}.{minor}"
    return _too_old[index]


gpu_too_old._dynamo_marked_constant = True  # as above


def _triton(device_type: str) -> tuple[bool, str]:
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        hint = "; TRITON_INTERPRET=1 interprets them on the CPU, very slowly" if device_type == "cpu" else ""
        return False, f"the Triton kernels need a GPU{hint}"
    try:
        import torch
        import triton

        from .experts import triton_op  # noqa: F401 - a Triton too old for our kernels shows here
    except Exception as error:  # a broken installation raises whatever it likes; what follows needs no Triton
        return False, f"the Triton kernels cannot be imported ({type(error).__name__}: {error})"
    if device_type == "cuda":  # of several GPUs some may do; `supports` then refuses the tensors on the others
        reasons = [gpu_too_old(index) for index in range(torch.cuda.device_count())]
        if reasons and all(reasons):
            return False, reasons[0]
    remark = ", interpreted: for tests only" if interpreted else ", untested on ROCm" if torch.version.hip else ""
    return True, f"Triton {triton.__version__}{remark}"
