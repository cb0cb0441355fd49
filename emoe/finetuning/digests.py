"""Which texts a run was trained and scored on: digests in its run.json, and the check that a folder's seeds share them.

A task's name and its files' paths stay the same when somebody edits a file, and ids may be no more than row numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emoe.errors import UserError
from emoe.tasks.data import TaskData
from emoe.tasks.spec import Example

BEGUN = "data.json"
"""In a run's .training folder: the digests, until its run.json has them."""


def digests_of(data: TaskData) -> dict[str, Any]:
    """``{"train": sha256, "sets": {name: sha256}}``; training texts in their order, which training follows."""
    sets = {name: _digest(sorted(test.examples, key=lambda example: example.id)) for name, test in data.tests.items()}
    return {"train": _digest(data.train), "sets": sets}


def _digest(examples: Iterable[Example]) -> str:
    found = hashlib.sha256()
    for example in examples:
        line = json.dumps([example.id, example.text, example.pair, example.label])
        found.update(line.encode() + b"\n")
    return found.hexdigest()


def require_same_data(found: dict[str, Any], record: Path, begun: Path, flag: str) -> None:
    """Raise `UserError` where a seed was made with other texts. One that says nothing is of a version before digests.

    Args:
        found: the texts of now, as `digests_of` has them.
        record: the seed's run.json.
        begun: its .training folder, where it has not finished.
        flag: to name.
    """
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8")).get("data")
    else:
        made = json.loads((begun / BEGUN).read_text(encoding="utf-8")) if (begun / BEGUN).is_file() else None
    if made is None:
        return
    changed = ["training"] if made["train"] != found["train"] else []
    changed += [name for name, digest in found["sets"].items() if made["sets"].get(name, digest) != digest]
    if changed:
        raise UserError(
            f"{flag}: {record.parent} was made with other data: the texts of {', '.join(changed)} have changed since; "
            "bring them back or use another --output" + (", or --overwrite" if flag == "--resume" else "")
        )
