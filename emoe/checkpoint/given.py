"""What ``--model`` and ``--output`` name, as far as small files tell: asked before torch and transformers are imported,
which takes seconds."""

from __future__ import annotations

from pathlib import Path

from emoe.errors import UserError

CONVERTED, WITH_EXPERTS, CAUSAL = "a converted checkpoint", "a checkpoint with experts", "a causal language model"
"""What verbs take that want a folder."""


def given_model(name: str, kind: str) -> Path:
    """The folder of ``--model``, which may not be there; ``kind`` is what it should hold.

    Raises:
        UserError: none was named.
    """
    if not name:
        raise UserError(f"--model: missing; give the folder of {kind}")
    return Path(name)


def given_output(name: str) -> Path:
    """The folder of ``--output``.

    Raises:
        UserError: none was named.
    """
    if not name:
        raise UserError("--output: missing; name the folder to write")
    return Path(name)


def require_folder(folder: Path, flag: str = "--model", kind: str = CONVERTED) -> None:
    """Raise `UserError` where there is no folder; ``kind`` as for `given_model`."""
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is not a folder; give the folder of {kind}")
