"""The config.json of a converted checkpoint, checked before anybody relies on a field of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe.checkpoint.limits import check_sizes
from emoe.errors import UserError, shortened
from emoe.families import family
from emoe.plainfiles import read_json


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Source(_Strict):
    family: str
    architectures: list[str] | None = None


class _Method(_Strict):
    method: str
    reference: str


class _Calibration(_Strict):
    sources: list[str]
    tokens: int


class _Provenance(_Strict):
    emoe_version: str
    source: str
    source_digest: str
    split: _Method
    gate: _Method
    calibration: _Calibration
    seed: int


class _Converted(_Strict):
    num_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    emoe_layers: list[int] = Field(min_length=1)
    emoe_gate: str
    emoe_source: _Source
    emoe_ffn: dict[str, Any]
    emoe_provenance: _Provenance


def read_converted(folder: Path, flag: str = "--model") -> dict[str, Any]:
    """config.json of a converted checkpoint, with every field that a conversion writes.

    Raises:
        UserError: not a converted checkpoint, or one whose config.json was damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is not a folder; give the folder of a converted checkpoint")
    path = folder / "config.json"
    config = read_json(path, flag)
    model_type = str(config.get("model_type", ""))
    if not model_type.startswith("emoe_"):
        raise UserError(
            f"{flag}: {folder} is not a converted checkpoint (model_type {shortened(model_type)}); convert it first"
        )
    check_sizes(config, path, flag)
    try:
        found = _Converted.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{flag}: {path}: {field}: {first['msg']}; convert the model again") from None
    if found.emoe_source.family != model_type.removeprefix("emoe_"):
        raise UserError(f"{flag}: {path}: emoe_source and model_type name different families; convert the model again")
    family(found.emoe_source.family)
    return config
