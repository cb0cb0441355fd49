"""``SHA256SUMS``: the digest of every weight file as it was written, in the form that ``sha256sum -c`` reads.

safetensors notices a file that is too short, not one with a flipped bit or with the name of another.
"""

from __future__ import annotations

import re
from pathlib import Path

from emoe.bytecount import ByteCount, Show
from emoe.errors import UserError
from emoe.runtime import sha256_file, write_text

NAME = "SHA256SUMS"


def write_digests(folder: Path, known: dict[str, str] | None = None) -> None:
    """Record the digests of a folder's safetensors files, those in `known` without reading them again."""
    known = known or {}
    files = sorted(folder.glob("*.safetensors"))
    write_text(folder / NAME, "".join(f"{known.get(f.name) or sha256_file(f)}  {f.name}\n" for f in files))


def check_digests(folder: Path, flag: str = "--model", show: Show | None = None) -> dict[str, str]:
    """Read all weight files and compare; hex sha256 by file name, nothing for a folder without the record.

    Args:
        folder: the checkpoint.
        flag: that names it, for messages.
        show: told how far this is, in MiB.

    Raises:
        UserError: a file that is missing or is another than was written.
    """
    if not (folder / NAME).is_file():
        return {}
    text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    entries = [re.fullmatch(r"([0-9a-f]{64})  ([\w.+-]{1,200})", line) for line in text.splitlines()]
    digests: dict[str, str] = {}
    files = [folder / entry[2] for entry in entries if entry]
    seen = ByteCount(show, "comparing", sum(file.stat().st_size for file in files if file.is_file()))
    for entry in entries:
        if entry is None:
            raise UserError(f"{flag}: {folder / NAME} is damaged; convert the model again, or delete it")
        digest, name = entry.groups()
        if not (folder / name).is_file():
            raise UserError(f"{flag}: {folder / name} is missing; copy or convert the model again")
        if (found := sha256_file(folder / name, seen)) != digest:
            raise UserError(
                f"{flag}: {folder / name} is not what was written (digest {found[:12]}…, {NAME} says {digest[:12]}…): "
                f"damaged, swapped, or saved over; copy or convert the model again, or delete {NAME} if you changed it"
            )
        digests[name] = found
    return digests
