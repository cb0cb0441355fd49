"""What was done to a checkpoint, from which one, and when: the entries of its provenance."""

from __future__ import annotations

import hashlib
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import emoe
from emoe.checkpoint.reader import shard_map
from emoe.runtime import sha256_file


def digest_of(folder: Path, known: dict[str, str] | None = None) -> str:
    """Hex sha256 over config.json and the weight files of a checkpoint, in order of their names.

    Args:
        folder: the checkpoint.
        known: hex sha256 of weight files by name, which are not read again.
    """
    known = known or {}
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(set(shard_map(folder).values()))]:
        digest.update(f"{path.name} {known.get(path.name) or sha256_file(path)}\n".encode())
    return digest.hexdigest()


def entry(verb: str, folder: Path, known: dict[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    """One entry of a history; `known` as for `digest_of`. ``SOURCE_DATE_EPOCH`` (reproducible-builds.org) sets the
    clock."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    return {
        "verb": verb,
        "from_digest": digest_of(folder, known),
        "when": now.isoformat(timespec="seconds"),
        "emoe": emoe.__version__,
        **facts,
    }
