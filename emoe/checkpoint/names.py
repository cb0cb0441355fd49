"""What others get to see of paths: the name of a file, not the place where it lies on somebody's disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"(?<![\w.:/~-])~?(?:/[^\s/\"'`,;()<>]+){2,}")
"""An absolute path of two parts or more within a text; no address, no "and/or"."""


def names_only(value: Any) -> Any:
    """Values as JSON and YAML have them, with every absolute path in a text, and those below ``~``, cut to its name.

    ``/home/me/a.txt`` → ``a.txt``, ``code=/home/me/code.txt`` → ``code=code.txt``. Keys stay as they are.
    """
    if isinstance(value, dict):
        return {key: names_only(one) for key, one in value.items()}
    if isinstance(value, list):
        return [names_only(one) for one in value]
    if not isinstance(value, str):
        return value
    head, equals, path = value.rpartition("=")
    if path.startswith(("/", "~/")):  # all of it: there may be spaces in it
        return f"{head}{equals}{Path(path).name or path}"
    return _PLACE.sub(lambda found: Path(found[0]).name, value)
