"""The config.json of a converted checkpoint, checked before anybody relies on a field of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe.checkpoint.given import require_folder
from emoe.checkpoint.limits import LARGEST, check_sizes
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition
from emoe.errors import UserError, shortened
from emoe.families import family
from emoe.plainfiles import read_json

Groups = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST["num_experts"])]], Field(min_length=1)]
"""Modules of a layer after surgery: those in the budget, then what each extension added."""


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


class _Step(_Strict):
    verb: str
    from_digest: str | None = None
    when: str | None = None
    settings: dict[str, Any] | None = None
    added: dict[str, int] | None = None
    steps: int | None = None


class Changed(_Strict):
    """The part of a provenance that surgery and training write, of any kind of model."""

    history: list[_Step] = []


SOURCE_S = "the source's"
"""What the provenance says of output matrices that were not refitted."""


class _Provenance(Changed):
    emoe_version: str
    source: str
    source_digest: str
    split: _Method
    gate: _Method
    calibration: _Calibration
    seed: int
    outputs: str = ""


class _Converted(_Strict):
    architectures: list[str] | None = None
    num_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    emoe_layers: list[int] = Field(min_length=1)
    emoe_gate: str
    emoe_routing: str = "top-k"
    emoe_allocation: str = "uniform"
    emoe_shared_experts: int = Field(0, ge=0)
    emoe_compensation: int = Field(0, ge=0)
    emoe_compensation_of: int | None = Field(None, ge=1)
    emoe_groups: list[Groups] | None = None
    emoe_expert_size: int | None = Field(None, ge=1)
    emoe_copies: int = Field(0, ge=0)
    emoe_source: _Source
    emoe_ffn: dict[str, Any]
    emoe_provenance: _Provenance


def read_converted(folder: Path, flag: str = "--model") -> dict[str, Any]:
    """config.json of a converted checkpoint, with every field that a conversion writes, in keeping with the partition.

    Raises:
        UserError: not a converted checkpoint, or one whose config.json was damaged.
    """
    require_folder(folder, flag)
    path = folder / "config.json"
    config = read_json(path, flag)
    model_type = str(config.get("model_type", ""))
    if model_type == "moduleformer":
        raise UserError(f"{flag}: {folder} is a ModuleFormer, born with experts; this is for converted checkpoints")
    if not model_type.startswith("emoe_"):
        raise UserError(
            f"{flag}: {folder} is not a converted checkpoint (model_type {shortened(model_type)}); convert it first"
        )
    check_sizes(config, path, flag)
    found = checked(_Converted, config, f"{flag}: {path}", "convert the model again")
    if found.emoe_source.family != model_type.removeprefix("emoe_"):
        raise UserError(f"{flag}: {path}: emoe_source and model_type name different families; convert the model again")
    family(found.emoe_source.family)
    _check_numbers(found, f"{flag}: {path}")
    _check_partition(found, folder / PARTITION, flag)
    return config


def checked(kind: type[BaseModel], value: Any, where: str, advice: str) -> Any:
    """`value` as a record of this kind.

    Raises:
        UserError: it is none; the first wrong field is named behind `where`.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {field[:80]}: {first['msg']}; {advice}") from None


def _check_numbers(found: _Converted, where: str) -> None:
    """Raise `UserError` where numbers of experts contradict each other."""
    experts, groups = found.num_experts, found.emoe_groups
    wrong = None
    if found.num_experts_per_tok > experts:
        wrong = f"num_experts_per_tok: {found.num_experts_per_tok} is more than num_experts, {experts}"
    elif found.emoe_shared_experts > experts:
        wrong = f"emoe_shared_experts: {found.emoe_shared_experts} is more than num_experts, {experts}"
    elif groups is not None and (len(groups) != len(found.emoe_layers) or not found.emoe_expert_size):
        wrong = "emoe_groups: needs an entry for each of emoe_layers, and emoe_expert_size"
    elif groups is not None and (max(g[0] for g in groups) != experts or min(g[0] for g in groups) < 1):
        wrong = f"emoe_groups: the largest first number must be num_experts, {experts}, the least 1"
    if wrong:
        raise UserError(f"{where}: {wrong}; convert the model again")


def _check_partition(found: _Converted, path: Path, flag: str) -> None:
    """Raise `UserError` where the partition is of another model."""
    partition = Partition.load(path)
    if sorted(partition.labels) != sorted(found.emoe_layers):
        raise UserError(f"{flag}: {path} and config.json name different layers; convert the model again")
    sizes = {len(labels_F) // partition.num_experts for labels_F in partition.labels.values()}
    same = sizes == {found.emoe_expert_size} if found.emoe_groups else partition.num_experts == found.num_experts
    if not same and not found.emoe_copies:  # copies of a whole FFN are not what the partition speaks of
        raise UserError(f"{flag}: {path} and config.json speak of different experts; convert the model again")
