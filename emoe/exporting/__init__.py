"""Ways out of a converted checkpoint. A further format is one new file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emoe.errors import UserError, nearest

FORMATS = {"dense": "the source's own architecture, neurons in their original order"}


def export(model: str | Path, output: str | Path, to: str = "dense", *, progress: Callable | None = None) -> dict:
    """Write a converted checkpoint in another format.

    Args:
        model: folder of a converted checkpoint.
        output: folder to write; must not exist.
        to: a key of `FORMATS`.

    Raises:
        UserError: unknown format, not a converted checkpoint, or an output that exists.
    """
    if to not in FORMATS:
        raise UserError(f"--to: unknown format '{to}'{nearest(to, FORMATS)}. Known formats: {', '.join(FORMATS)}")
    model, output = Path(model), Path(output)
    if output.exists():
        raise UserError(f"--output: {output} exists; choose another folder")
    from emoe.exporting.dense import export_dense

    try:
        return export_dense(model, output, progress or (lambda stage, done, total: None))
    except OSError as error:
        raise UserError(
            f"--output: cannot write {output} ({error.strerror or error}); make room and try again"
        ) from None
