"""Whether unfinished work is this call's: its settings, and what stands behind the names in them.

The path of a model or a text stays the same when somebody puts another file there: digests tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emoe.errors import UserError, shortened
from emoe.plainfiles import read_json
from emoe.runtime import write_text


def require_same_settings(settings: dict[str, Any], kept: Path, what: str) -> None:
    """Raise `UserError` where the work in progress had other settings; the first that differs is named.

    Args:
        settings: all that the result depends on.
        kept: the JSON file with those of the unfinished work.
        what: the kind of work, for the message: "recovery".
    """
    before = read_json(kept, "--resume")
    now = json.loads(json.dumps(settings))
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"--resume: the unfinished {what} had other settings ({key}: {shortened(before.get(key))}, now "
                f"{shortened(now.get(key))}); use the same ones, or start again with --overwrite"
            )


def require_same_sources(digests: dict[str, str], kept: Path, what: str) -> None:
    """Keep digests in ``kept``, or refuse to go on from other files.

    Args:
        digests: flag, or flag and name, → digest of what it names.
        kept: a JSON file in the state folder; work of a version without digests has none, and goes on.
        what: as for `require_same_settings`.

    Raises:
        UserError: a model or a text has changed; all that have are named.
    """
    before = read_json(kept, "--resume") if kept.is_file() else {}
    changed = [flag for flag, digest in digests.items() if before.get(flag, digest) != digest]
    if changed:
        raise UserError(
            f"--resume: what {', '.join(changed)} names has changed since the unfinished {what} began; bring it back, "
            "or start again with --overwrite"
        )
    write_text(kept, json.dumps(digests))
