"""Which implementation of the kernels runs.

The innermost `with use(name):` decides; outside of any, the environment variable EMOE_KERNELS; without that, "auto".
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType

IMPLEMENTATIONS = ("reference", "portable")
"""reference: the equation, dense. portable: sparse, in PyTorch alone."""

AUTO = "auto"
"""The fastest implementation that runs here: `portable`, the only sparse one so far."""

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
    default. A backward pass belongs to the implementation that ran forward. ValueError for an unknown name, raised
    by this call and not by entering.
    """
    return _Use(_check(name, "name"))


def resolve() -> str:
    """The name of the implementation that runs now, one of `IMPLEMENTATIONS`.

    ValueError if EMOE_KERNELS holds an unknown name; empty counts as unset.
    """
    name = _chosen.get()
    if name is None:
        name = _check(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)
    return "portable" if name == AUTO else name
