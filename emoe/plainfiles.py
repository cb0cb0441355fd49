"""JSON and YAML from files that a stranger may have written: of bounded size, without aliases or tags, with one kind of
error.

A YAML alias lets 400 bytes stand for a billion values; they cost nothing until somebody prints one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from emoe.errors import UserError

LARGEST_JSON = 64 << 20
"""Bytes; the index of a checkpoint with a hundred thousand tensors has ten million."""
LARGEST_YAML = 1 << 20
"""Bytes; ours have a few thousand."""


class _PlainLoader(yaml.SafeLoader):
    """Safe values only, each written out where it stands; 5:10 is text, not the number 310 to the base of 60."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; write the value out", mark)
        return super().compose_node(parent, index)

    def number_or_text(self, node: yaml.ScalarNode) -> int | float | str:
        """A number, unless it is one by YAML 1.1's base of 60 alone, which YAML 1.2 has given up."""
        if ":" in node.value:
            return node.value
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.number_or_text)


def read_json(path: Path, flag: str = "--model") -> dict[str, Any]:
    """A JSON object from a file, or a `UserError` that names it."""
    text = _read_text(path, flag, LARGEST_JSON, "give the folder of a transformers checkpoint")
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{flag}: {path} is nested too deeply; do not trust it") from None
    except ValueError as error:  # a number of more digits than Python reads is no JSONDecodeError
        raise UserError(f"{flag}: {path} is not valid JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise UserError(f"{flag}: {path} must hold a JSON object")
    return value


def read_yaml(path: Path, flag: str) -> Any:
    """The value of a YAML file, of plain types, or a `UserError` that names it."""
    text = _read_text(path, flag, LARGEST_YAML, "name an existing YAML file")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise UserError(f"{flag}: {path} is nested too deeply; do not trust it") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML's constructors let through what int, datetime and re say of a bad value
        raise UserError(f"{flag}: {path} is not valid YAML ({' '.join(str(error).split())})") from None


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML between dashes that a Markdown file begins with; empty where there is none that can be read."""
    head = re.match(r"---\r?\n(.*?)\n---", _start_of(path), re.DOTALL)
    try:
        found = yaml.load(head[1], Loader=_PlainLoader) if head else None
    except (RecursionError, yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError):
        return {}
    return found if isinstance(found, dict) else {}


def _start_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_YAML).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _read_text(path: Path, flag: str, largest: int, advice: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"{flag}: cannot read {path}, it does not exist; {advice}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: cannot read {path} ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > largest:
        raise UserError(f"{flag}: {path} has more than {largest >> 20} MiB, no such file does; do not trust it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {path} is not valid JSON or YAML: {error.reason} at byte {error.start}") from None
