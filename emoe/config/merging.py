"""From presets, YAML files and flags to settings; what is wrong is told by the flag's name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emoe.config.base import Settings
from emoe.config.conversion import ConvertConfig
from emoe.errors import UserError, nearest, shortened
from emoe.plainfiles import read_yaml

DEFAULT_PRESET = "fast"
WHY_DEFAULT_PRESET = "no --preset was given; the best training-free gate, in every layer unless --layers is given"


def flag_of(key: str) -> str:
    """``calibration_tokens`` → ``--calibration-tokens``."""
    return "--" + key.replace("_", "-")


def presets() -> dict[str, Path]:
    """Preset name → file in configs/convert."""
    import emoe_configs

    folder = Path(emoe_configs.__file__).parent / "convert"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_config_file(path: Path, flag: str = "--config", kind: type[Settings] = ConvertConfig) -> dict[str, Any]:
    """Settings from a YAML file; keys are checked, values not yet.

    Raises:
        UserError: unreadable file, not a mapping, or an unknown key (the nearest known one is named).
    """
    values = read_yaml(path, flag)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{flag}: {path} must hold 'key: value' lines")
    for key in values:
        if key not in kind.model_fields:
            raise UserError(f"{flag}: {path}: unknown key {shortened(key)}{nearest(str(key), kind.model_fields)}")
    return values


def merge_settings(
    kind: type[Settings], flags: dict[str, Any], config_file: Path | None = None, under: dict[str, Any] | None = None
) -> Any:
    """Settings of a kind from flags over a file over `under`.

    Raises:
        UserError: an unknown key, or a value of the wrong kind; the flag is named.
    """
    values = {**(under or {}), **(read_config_file(config_file, kind=kind) if config_file else {})}
    values |= {key: value for key, value in flags.items() if value is not None}
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = value = str(value)
        if key not in kind.model_fields:
            raise UserError(f"{flag_of(key)}: there is no such setting{nearest(key, kind.model_fields)}")
        annotation = kind.model_fields[key].annotation
        if isinstance(value, str) and annotation == list[str]:
            values[key] = [value]
        elif annotation in (list[int], list[float]):
            items = value if isinstance(value, list) else [value]
            values[key] = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(f"{flag_of(key)}: {_demand(first)}, got {shortened(first['input'])}") from None


def _demand(error: Any) -> str:
    """What pydantic found missing in a value, said as to a user."""
    limits = error.get("ctx", {})
    number = {"int": "a whole number", "float": "a number"}
    match error["type"].split("_"):
        case ["greater", "than", "equal"]:
            return f"must be at least {limits['ge']:.15g}"
        case ["greater", "than"]:
            return f"must be above {limits['gt']:.15g}"
        case ["less", "than", "equal"]:
            return f"must be at most {limits['le']:.15g}"
        case ["less", "than"]:
            return f"must be below {limits['lt']:.15g}"
        case [("int" | "float") as kind, *_]:
            return f"must be {number[kind]}"
        case ["literal", "error"]:
            known = re.findall(r"'([^']+)'", limits["expected"])
            return f"must be one of {', '.join(known)}{nearest(str(error['input']), known)}"
    return error["msg"]


def resolve_config(flags: dict[str, Any], config_file: Path | None = None) -> tuple[ConvertConfig, str]:
    """Merge preset, file and flags; also one line on the preset that was taken and why.

    Raises:
        UserError: an unknown preset or key, or a value of the wrong kind; the flag is named.
    """
    given = read_config_file(config_file) if config_file else {}
    given |= {key: value for key, value in flags.items() if value is not None}
    if flags.get("active") is not None and flags.get("budget") is not None:  # a file that we wrote has both
        raise UserError("--budget: says how many experts are used, as --active does; give one of them")
    preset = str(given.get("preset") or DEFAULT_PRESET)
    known = presets()
    if preset not in known:
        raise UserError(
            f"--preset: unknown preset {shortened(preset)}{nearest(preset, known)}. Known: {', '.join(known)}"
        )
    why = "--preset" if given.get("preset") else WHY_DEFAULT_PRESET
    under = read_config_file(known[preset], "--preset")
    config = merge_settings(ConvertConfig, {**given, "preset": preset}, under=under)
    if config.model and not config.output:
        config = config.model_copy(update={"output": default_output(config.model)})
    return config, f"preset '{preset}': {why}"


def default_output(model: str) -> str:
    """Where a conversion goes when nobody says so: "org/Llama-2-7b" and "x/Llama-2-7b.gguf" → "Llama-2-7b-emoe"."""
    return f"{os.path.basename(os.path.abspath(model)).removesuffix('.gguf')}-emoe"
