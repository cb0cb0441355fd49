"""The disk at its limits: one line when it is full, and folders that go as a whole."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emoe.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EIO, errno.EROFS, errno.EACCES, errno.EBUSY)
"""What the operating system says in writing, where there is no room and where more room is no help."""

TORCH_WRITES = ("PytorchStreamWriter", "unexpected pos")
"""One of these is in what torch raises when a file cannot be written, not in what it says in reading."""

RUST = re.compile(r"\(os error (\d+)\)")
"""What safetensors and tokenizers, which are Rust, say of an error of the operating system: its number."""


@contextmanager
def full_disk_told(
    output: Path, way_on: str = "try again", *, flag: str = "--output", kept: str = ""
) -> Iterator[None]:
    """Make one line of what Python, torch, safetensors and tokenizers raise when ``output`` cannot be written.

    Args:
        output: the folder or file; its unfinished parts lie in it or beside it, under ``.{name}.…``.
        way_on: what to do when there is room, for the message.
        flag: that names the output.
        kept: what is as it was, for the message.

    Raises:
        UserError: instead of theirs. What was raised in reading, or in writing elsewhere, stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number, file = _number_of(error), _file_of(error)
        full = number in FULL or any(sign in str(error) for sign in TORCH_WRITES)
        if not _is_part(file, output.absolute()) if file else not (full or number in UNWRITABLE):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        told = [f"{flag}: cannot write {output} ({reason})", *filter(None, [kept])]
        told.append(f"make room and {way_on}" if full else "choose another place")
        raise UserError("; ".join(told)) from None


def _number_of(error: Exception) -> int | None:
    """The operating system's number of an error."""
    said = RUST.search(str(error))
    return getattr(error, "errno", None) or (int(said[1]) if said else None)


def _file_of(error: Exception) -> str | None:
    """The file that an error names; of a copy, the one that is written, which comes second."""
    file = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    return os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else None


def _is_part(file: str, output: Path) -> bool:
    """Whether a file is the output's, or that of a folder on the way to it."""
    place = Path(file).absolute()
    if output.is_relative_to(place):
        return True
    beside = place.relative_to(output.parent).parts[0] if place.is_relative_to(output.parent) else ""
    return beside == output.name or beside.startswith(f".{output.name}.")


def name_place(error: OSError, place: Path) -> None:
    """Say in an error what was being written: on a full disk `write` names nothing."""
    if error.errno in FULL and error.filename is None:
        error.filename = str(place)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, by a rename: a process that is killed leaves all of it or nothing.

    What such a process left of an earlier removal goes as well.
    """
    if folder.is_symlink():  # what it points to is not ours
        folder.unlink()
        return
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        os.rename(folder, hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden, ignore_errors=True)
