"""Bytes that are read or fetched, counted for a progress bar."""

from __future__ import annotations

from collections.abc import Callable

MIB = 1 << 20

Show = Callable[[str, int, int], None]
"""Called with stage, done, total; here in MiB."""


class ByteCount:
    """Adds up bytes: ``count(n)`` for n more.

    Args:
        show: told of the sum, in whole MiB.
        stage: what is done with them.
        total: bytes in all; 0 if that is not known.
    """

    def __init__(self, show: Show | None, stage: str, total: int) -> None:
        self.show, self.stage, self.total, self.done = show, stage, total, 0

    def __call__(self, count: int) -> None:
        self.set(self.done + count)

    def set(self, done: int) -> None:
        """So many in all."""
        self.done = done
        if self.show:
            total = max(self.total, done)
            whole = -(-total // MIB)
            self.show(self.stage, whole if done == total else done // MIB, whole)
