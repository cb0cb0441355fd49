"""Settings of `emoe convert`: one class gives the YAML file, the command's flags and the Python function their fields.

Precedence: defaults, then the preset, then ``--config``, then flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe.errors import UserError, nearest

DEFAULT_PRESET = "fast"
WHY_DEFAULT_PRESET = "no --preset was given; it converts every layer with the best training-free gate"


def _setting(default: Any, text: str, **limits: Any) -> Any:
    return Field(default, description=text, **limits)


class ConvertConfig(BaseModel):
    """Settings of a conversion. A field's description is its help text in the command line and states its unit."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str = _setting("", "Dense checkpoint: an alias (see `emoe models`), a folder, a .gguf file or a hub id.")
    revision: str | None = _setting(None, "Branch, tag or commit of a hub model.")
    output: str = _setting("", "Folder to write; must not exist unless --overwrite or --resume is given.")
    preset: str | None = _setting(None, "Settings to start from: 'fast' (all layers) or 'finetune' (the paper's).")

    experts: int = _setting(64, "E: experts a layer, equal blocks of neurons.", ge=1)
    top_k: int | None = _setting(None, "K: experts a token uses; default: --active times --experts.", ge=1)
    active: float = _setting(0.5, "Share of the experts that a token uses, when --top-k is not given.", gt=0, le=1)
    layers: str = _setting(
        "all", "Layers to convert: 'all', slices and numbers, such as '16:32:4' or '26,28' or '-4::2'."
    )
    split: str = _setting("coactivation", "How neurons are grouped: coactivation, weights, random or contiguous.")
    gate: str = _setting("discriminant", "How experts are chosen: discriminant, representative or average-key.")
    assignment: Literal["fast", "exact"] = _setting("fast", "Balanced assignment in clustering: fast or exact (slow).")

    calibration: list[str] = _setting(
        ["builtin"], "Text: a file, a folder, a dataset 'name[:config[:split]]' or 'builtin'; several mix equally."
    )
    calibration_tokens: int = _setting(32768, "Tokens to calibrate on.", ge=1)
    held_out_tokens: int = _setting(
        4096, "Tokens of the same text kept apart to measure quality; 0 for no report.", ge=0
    )
    sequence_length: int = _setting(512, "Tokens a block of text.", ge=8)
    seed: int = _setting(0, "Seed of everything random.", ge=0)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "Element type that calibration runs in; auto: the checkpoint's. Weights keep their own type on disk."
    )
    device: str = _setting("auto", "Where layers run: auto, cpu, cuda, cuda:1, …")
    batch_tokens: int = _setting(4096, "Tokens a forward call.", ge=1)
    cache_limit: float = _setting(
        4.0, "GiB of hidden states kept in memory, all streams together; what is beyond lies on disk.", ge=0
    )
    checkpoint_seconds: float = _setting(30.0, "Least seconds between two states that --resume can start from.", ge=0)

    resume: bool = _setting(False, "Go on with an interrupted conversion of the same settings.")
    overwrite: bool = _setting(False, "Replace an existing output folder, once the new one is complete.")
    dry_run: bool = _setting(False, "Check everything, say what would be done and what it costs, write nothing.")
    accept_license: bool = _setting(False, "Accept the licence of a packaged model that is not free for all use.")

    def fingerprint(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        leave = {"output", "resume", "overwrite", "dry_run", "checkpoint_seconds", "cache_limit", "accept_license"}
        return self.model_dump(exclude=leave)

    def to_yaml(self) -> str:
        """As a file for ``--config``: every setting of the conversion, nothing about this one run."""
        return yaml.safe_dump(self.model_dump(exclude={"resume", "overwrite", "dry_run", "output"}), sort_keys=False)


def flag_of(key: str) -> str:
    """``calibration_tokens`` → ``--calibration-tokens``."""
    return "--" + key.replace("_", "-")


def presets() -> dict[str, Path]:
    """Preset name → file in configs/convert."""
    import emoe_configs

    folder = Path(emoe_configs.__file__).parent / "convert"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_config_file(path: Path, flag: str = "--config") -> dict[str, Any]:
    """Settings from a YAML file; keys are checked, values not yet.

    Raises:
        UserError: unreadable file, not a mapping, or an unknown key (the nearest known one is named).
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot read {path} ({error})") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{flag}: {path} is not valid YAML ({problem})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{flag}: {path} must hold 'key: value' lines")
    for key in values:
        if key not in ConvertConfig.model_fields:
            raise UserError(f"{flag}: {path}: unknown key '{key}'{nearest(str(key), ConvertConfig.model_fields)}")
    return values


def resolve_config(flags: dict[str, Any], config_file: Path | None = None) -> tuple[ConvertConfig, str]:
    """Merge preset, file and flags; also one line on the preset that was taken and why.

    Raises:
        UserError: an unknown preset or key, or a value of the wrong kind; the flag is named.
    """
    given = read_config_file(config_file) if config_file else {}
    given |= {key: value for key, value in flags.items() if value is not None}
    preset = given.get("preset") or DEFAULT_PRESET
    known = presets()
    if preset not in known:
        raise UserError(f"--preset: unknown preset '{preset}'{nearest(str(preset), known)}. Known: {', '.join(known)}")
    why = "--preset" if given.get("preset") else WHY_DEFAULT_PRESET
    values = {**read_config_file(known[preset], "--preset"), **given, "preset": preset}
    if isinstance(values.get("calibration"), str):
        values["calibration"] = [values["calibration"]]
    try:
        return ConvertConfig(**values), f"preset '{preset}': {why}"
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(f"{flag_of(key)}: {first['msg']}, got {first['input']!r}") from None
