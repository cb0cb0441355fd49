"""What a cached folder must contain: size and sha256 of each file, and where they came from."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from emoe.bytecount import ByteCount, Show
from emoe.runtime import sha256_file

MANIFEST = "manifest.json"


def write_manifest(folder: Path, **facts: Any) -> None:
    """Record every file of ``folder`` beside the ``facts`` about its origin. Call it last, before the folder moves."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({**facts, "files": files}, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cached folder, or None when there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest.get("files"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None


def is_intact(folder: Path, *, verify: bool = False, show: Show | None = None) -> bool:
    """Whether every recorded file is there with its size (microseconds) and, with ``verify``, its sha256 (seconds).

    Args:
        show: told how far ``verify`` is, in MiB.
    """
    manifest = read_manifest(folder)
    if not manifest or not manifest["files"]:
        return False
    try:
        if any((folder / name).stat().st_size != record["size"] for name, record in manifest["files"].items()):
            return False
    except (OSError, KeyError, TypeError):
        return False
    seen = ByteCount(show, "checking", sum(record["size"] for record in manifest["files"].values()))
    files = manifest["files"].items() if verify else ()
    return all(sha256_file(folder / name, seen) == record.get("sha256") for name, record in files)


def discard(folder: Path) -> None:
    """Take a damaged folder out of the way, then delete it.

    The rename comes first so that no other process meets a half-deleted folder under the real name. If another
    process was quicker, there is nothing left to do.
    """
    trash = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    try:
        os.rename(folder, trash / folder.name)
    except FileNotFoundError:
        pass
    finally:
        shutil.rmtree(trash, ignore_errors=True)
