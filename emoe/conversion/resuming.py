"""Whether work that lies there, unfinished or finished, is this call's: its settings, and what their names stand for.

The path of a model or a text stays the same when somebody puts another file there: digests tell.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from emoe.config import Settings
from emoe.errors import Finished, UserError, shortened
from emoe.plainfiles import read_json, read_yaml
from emoe.runtime import write_text


class Work(NamedTuple):
    """What a call makes that can be gone on with."""

    kind: str
    """For messages: "recovery"."""
    settings: Settings
    """Of this call."""
    record: str
    """File of the finished output with the settings that it was made with: its report, or one for ``--config``."""
    report: str = ""
    """Its report, if that is another file."""


def refuse_finished(output: Path, work: Work) -> NoReturn:
    """Say of a complete output that there is nothing to go on with, or that this call would make another one.

    Raises:
        Finished: it was made with these settings.
        UserError: it was made with others, of which the first that differs is named, or is no work of this kind.
    """
    again = "choose another --output, or make it anew with --overwrite"
    for name in filter(None, (work.report, work.record)):
        if not (output / name).is_file():
            raise UserError(f"--resume: {output} is no finished {work.kind}, it has no {name}; {again}")
    if difference := difference_from_record(work.settings, output / work.record):
        raise UserError(f"--resume: the finished {work.kind} in {output} had other settings ({difference}); {again}")
    raise Finished(f"{output} is finished: nothing to go on with; --overwrite makes it anew")


def difference_from_record(settings: Settings, record: Path, flag: str = "--resume") -> str | None:
    """The first setting that is not what it is in the record of earlier work, with both values; None if none is.

    Args:
        settings: of now.
        record: the file; what it lacks had its default, an older version had fewer settings.
        flag: to name where it cannot be read.

    Raises:
        UserError: it holds no settings.
    """
    kept, now = type(settings)().fingerprint() | _recorded(record, flag), settings.fingerprint()
    return _difference(now, {key: kept[key] for key in now})


def _recorded(record: Path, flag: str) -> dict[str, Any]:
    """The settings in a record; a report has them under "settings", but for the model, which may stand beside them."""
    found = read_yaml(record, flag) if record.suffix == ".yaml" else read_json(record, flag)
    settings = found.get("settings", found) if isinstance(found, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{flag}: {record} holds no settings; --overwrite makes it anew")
    return {"model": found.get("model"), **settings}


def _difference(settings: dict[str, Any], before: dict[str, Any]) -> str | None:
    """The first setting that is not what it was, with both values."""
    now = json.loads(json.dumps(settings))
    for key in [*now, *before]:
        if _placed(before.get(key)) != _placed(now.get(key)):
            return f"{key}: {shortened(before.get(key))}, now {shortened(now.get(key))}"
    return None


def _placed(value: Any) -> Any:
    """A setting, with absolute paths for what lies on the disk: ``./dense`` and ``dense/`` are the same folder."""
    if isinstance(value, list):
        return [_placed(one) for one in value]
    if isinstance(value, dict):
        return {key: _placed(one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    head, equals, path = value.rpartition("=")  # "code=corpus/code.txt"
    there = Path(os.path.expanduser(path))
    return f"{head}{equals}{there.resolve()}" if path and there.exists() else value


def require_same_settings(settings: dict[str, Any], kept: Path, what: str) -> None:
    """Raise `UserError` where the work in progress had other settings; the first that differs is named.

    Args:
        settings: all that the result depends on.
        kept: the JSON file with those of the unfinished work.
        what: the kind of work, for the message: "recovery".
    """
    refuse_other_settings(settings, read_json(kept, "--resume"), what)


def refuse_other_settings(settings: dict[str, Any], before: dict[str, Any], what: str) -> None:
    """`require_same_settings` of settings that have been read."""
    if difference := _difference(settings, before):
        raise UserError(
            f"--resume: the unfinished {what} had other settings ({difference}); use the same ones, or start again "
            "with --overwrite"
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
