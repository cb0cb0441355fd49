"""What reports look like on disk: files that others may have written, checked before anything of them is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from emoe.errors import UserError


class Record(BaseModel):
    """A checked part of a file; what else is in it does not matter."""

    model_config = ConfigDict(extra="ignore")


class Row(Record):
    """Quality at one number of experts."""

    top_k: int
    active: float
    value: float
    ratio: float | None
    agreement: float
    ffn_flops: float


class Quality(Record):
    """Quality on one domain, and on others."""

    measure: str
    dense: float
    tokens: int
    rows: list[Row]
    domains: dict[str, Quality] | None = None


class Load(Record):
    """How evenly a layer's experts were used."""

    evenness: float
    busiest: float


class Layer(Record):
    """One converted layer."""

    layer: int
    share: float | None = None
    load: Load | None = None


class Conversion(Record):
    """``emoe_report.json``, as far as it is shown."""

    model: str
    num_experts: int
    num_experts_per_tok: int
    quality: Quality | None = None
    layers: list[Layer]
    seconds: dict[str, float]
    peak_bytes: dict[str, float]


class CellDomain(Record):
    """One domain of a cell."""

    value: float
    ratio: float | None


class Cell(Record):
    """One way at one budget."""

    name: str
    wanted: float
    active: float
    experts: int
    domains: dict[str, CellDomain]


class Frontier(Record):
    """``frontier.json``."""

    model: str
    measure: str
    dense: dict[str, float]
    tokens: dict[str, int]
    cells: list[Cell]


def checked(kind: type[Record], value: Any, path: Path) -> Any:
    """`value`, which was read from `path`, as a record.

    Raises:
        UserError: it is none; the field is named.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"report: {path}: {field}: {first['msg']}; write it again") from None
