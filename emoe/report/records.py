"""What reports look like on disk: files that others may have written, checked before anything of them is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emoe.checkpoint import converted


class Record(BaseModel):
    """A checked part of a file; what else is in it does not matter."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


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


class Recovered(Record):
    """Perplexity by domain at one number of experts."""

    top_k: int
    active: float
    before: dict[str, float]
    after: dict[str, float]


class Recovery(Record):
    """``emoe_recover.json``, as far as it is shown."""

    steps: int
    minutes: float
    num_experts: int
    dense: dict[str, Annotated[float, Field(gt=0)]]
    rows: list[Recovered]

    @model_validator(mode="after")
    def _same_domains(self) -> Recovery:
        if any(self.dense.keys() - row.before.keys() or self.dense.keys() - row.after.keys() for row in self.rows):
            raise ValueError("rows lack a domain of dense")
        return self


class Pretraining(Record):
    """``emoe_pretrain.json``, as far as it is shown."""

    steps: int
    tokens: int
    perplexity: dict[str, float]
    emoe: str


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

    @model_validator(mode="after")
    def _same_stages(self) -> Conversion:
        if not self.seconds.keys() <= self.peak_bytes.keys():
            raise ValueError("peak_bytes lacks a stage of seconds")
        return self


class Compared(Record):
    """How an export compares with one reference."""

    reference: str
    tokens: int
    kl: float | None = None


class Export(Record):
    """``emoe_export.json``, as far as it is shown."""

    format: str
    exactness: str
    experts: int | None = None
    top_k: int | None = None
    comparisons: list[Compared] = []


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
    return converted.checked(kind, value, f"report: {path}", "write it again")
