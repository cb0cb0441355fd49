"""Exceptions that a user is meant to read: one line that names the flag and the fix."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that the user can put right. The command line prints it as one line and exits with status 2."""


class Finished(UserError):  # noqa: N818 - it is no error
    """What was to be gone on with is complete. One line as well, but exit status 0: a job that is started again after
    it has ended has not failed."""


class Busy(UserError):  # noqa: N818 - it is no error either
    """Another process is writing there. Whoever has other work may do that first."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shortened(value: object) -> str:
    """``repr(value)``, however large it is, in a line: what a user gave, to be shown back."""
    return _REPR.repr(value)


def nearest(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """`` (did you mean 'x'?)`` for the known name closest to ``name``, or nothing when none is close.

    Args:
        likeness: least `difflib` ratio that counts as close, 0 to 1.
    """
    close = difflib.get_close_matches(name[:80], list(known), n=1, cutoff=likeness)
    return f" (did you mean '{close[0]}'?)" if close else ""
