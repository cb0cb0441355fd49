"""What was done to a checkpoint, from which one, and when: the entries of its provenance."""

from __future__ import annotations

import hashlib
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import emoe
from emoe.checkpoint.converted import Changed, checked
from emoe.checkpoint.names import names_only
from emoe.checkpoint.reader import shard_map
from emoe.conversion.workspace import EXPORTED, PRUNED, TUNED
from emoe.errors import UserError, shortened
from emoe.plainfiles import read_json
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


def provenance_of(folder: Path, flag: str = "--model") -> dict[str, Any]:
    """Where a checkpoint comes from and what was done to it: of config.json, or of the report beside a stock one.

    Raises:
        UserError: a damaged one.
    """
    path = folder / "config.json"
    gguf = (folder / EXPORTED).is_file() and not path.exists()
    found = None if gguf else read_json(path, flag).get("emoe_provenance")
    for name in (TUNED, PRUNED, EXPORTED):
        if not found and (folder / name).is_file():
            path = folder / name
            found = read_json(path, flag).get("provenance")
    checked(Changed, found or {}, f"{flag}: {path}", "write it again")
    return found or {}


def with_entry(provenance: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """A provenance with one entry more in its history."""
    return {**provenance, "history": [*provenance.get("history", []), step]}


def now() -> str:
    """The time to the second, in UTC; ``SOURCE_DATE_EPOCH`` (reproducible-builds.org) sets the clock.

    Raises:
        UserError: that is no number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        time = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise UserError(
            f"SOURCE_DATE_EPOCH: {shortened(epoch)} is no time in seconds since 1970; set another or unset it"
        ) from None
    return time.isoformat(timespec="seconds")


def entry(verb: str, folder: Path, known: dict[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    """One entry of a history; `known` as for `digest_of`. Of paths it has names: it goes wherever the model goes."""
    return {
        "verb": verb,
        "from_digest": digest_of(folder, known),
        "when": now(),
        "emoe": emoe.__version__,
        **names_only(facts),
    }
