"""Tasks of a user: one YAML file naming files, columns, labels and domains; or instructions in Alpaca's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from emoe.errors import UserError, nearest
from emoe.plainfiles import read_yaml
from emoe.tasks.metrics import FITTING, METRICS
from emoe.tasks.sources import Columns, File, read_table
from emoe.tasks.spec import Domain, Example, Kind, Source, Task, Where

_PROMPT = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
)
"""The wording of Alpaca (Taori et al. 2023), which published instruction models were tuned with."""


def _quoted(name: Any) -> Any:
    if isinstance(name, bool):
        raise PydanticCustomError("boolean", "yes, no, on, off, true and false are booleans in YAML; put quotes around")
    return name


_Name = Annotated[str | int, BeforeValidator(_quoted)]
"""A label, as it stands in the files."""


class _DomainEntry(BaseModel):
    """One domain of the file. Paths are relative to the file; columns and labels override those of the task."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["id", "ood"]
    file: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    id: str | None = None
    classes: dict[_Name, _Name | None] | None = None
    """Raw label → one of the task's labels, null to leave such examples out."""


class _TaskEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    summary: str = ""
    labels: list[_Name] = Field(default_factory=list)
    """Names of the classes, as they stand in the files; none for regression."""
    metric: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    id: str | None = None
    domains: dict[str, _DomainEntry]


def task_from_yaml(path: Path) -> Task:
    """Read a task file.

    Raises:
        UserError: unreadable, an unknown key, a metric that is unknown or does not fit, not exactly one ID domain, a
            domain without files or under the name of the validation set.
    """
    raw = read_yaml(path, "--task")
    try:
        entry = _TaskEntry(**raw)
    except TypeError:
        raise UserError(f"--task: {path} must hold 'key: value' lines") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--task: {path}: {where}: {first['msg']}") from None
    metric = entry.metric or ("balanced_accuracy" if entry.labels else "pearson")
    if metric not in METRICS:
        raise UserError(f"--task: {path}: unknown metric '{metric}'{nearest(metric, METRICS)}")
    kind: Kind = "classification" if entry.labels else "regression"
    if metric not in FITTING[kind]:
        scored = "classes" if entry.labels else "numbers, and no labels are named"
        raise UserError(f"--task: {path}: metric '{metric}' does not fit {scored}; take {', '.join(FITTING[kind])}")
    if len(entry.labels) == 1:
        raise UserError(f"--task: {path}: one label is nothing to learn; name all labels, or none for regression")
    doubled = next(
        (label for label in entry.labels if [str(other) for other in entry.labels].count(str(label)) > 1), None
    )
    if doubled is not None:
        raise UserError(f"--task: {path}: label '{doubled}' is named twice; a class has one name")
    roles = [domain.role for domain in entry.domains.values()]
    if roles.count("id") != 1:
        raise UserError(f"--task: {path}: {roles.count('id')} domains have the role 'id'; exactly one is trained on")
    validation = next(f"{name}-validation" for name, domain in entry.domains.items() if domain.role == "id")
    if validation in entry.domains:
        raise UserError(f"--task: {path}: '{validation}' is the name of the validation set; call the domain otherwise")
    domains = tuple(_domain(entry, name, domain, path) for name, domain in entry.domains.items())
    more = ("accuracy",) if entry.labels and metric != "accuracy" else ()
    labels = tuple(str(label) for label in entry.labels)
    return Task(entry.name, entry.summary, labels, (metric, *more), domains, kind)


def _domain(task: _TaskEntry, name: str, entry: _DomainEntry, path: Path) -> Domain:
    named = {part: getattr(entry, part) for part in ("train", "validation", "test") if getattr(entry, part)}
    if entry.file:
        named["all" if entry.role == "id" else "test"] = entry.file
    wanted = {"id": "'file', or 'train' and perhaps 'validation' and 'test'", "ood": "'file'"}[entry.role]
    fits = {"id": set(named) == {"all"} or ("train" in named and "all" not in named), "ood": set(named) == {"test"}}
    if not fits[entry.role]:
        raise UserError(f"--task: {path}: domain '{name}' needs {wanted}")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"--task: {path}: domain '{name}' names files of predictions; use letters, digits, - and _")
    columns = Columns(
        text=entry.text or task.text,
        label=entry.label or task.label,
        pair=entry.pair or task.pair,
        id=entry.id or task.id,
        classes=_classes(task, name, entry, path),
    )
    return Domain(name, entry.role, {part: File(path.parent / file, columns) for part, file in named.items()})


def _classes(task: _TaskEntry, name: str, entry: _DomainEntry, path: Path) -> Any:
    if not task.labels:
        return float
    indices = {str(label): index for index, label in enumerate(task.labels)}
    if entry.classes is None:
        return indices
    classes = {}
    for raw, label in entry.classes.items():
        if label is not None and str(label) not in indices:
            raise UserError(f"--task: {path}: domain '{name}': '{label}' is none of the labels {', '.join(indices)}")
        classes[str(raw)] = -1 if label is None else indices[str(label)]
    return classes


@dataclass(frozen=True)
class Instructions:
    """Alpaca's format: objects with "instruction", "output" and perhaps "input"."""

    path: Path

    def read(self, where: Where):
        for number, row in enumerate(read_table(self.path)):
            if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
                raise UserError(f"--task: {self.path}, entry {number + 1} has no text 'instruction' and 'output'")
            if row["output"].strip():
                yield Example(str(number), prompt_of(row), row["output"].strip(), 0)


def prompt_of(row: Mapping[str, Any]) -> str:
    """The text before an answer."""
    given = str(row.get("input") or "").strip()
    head = _PROMPT.format(more=", paired with an input that provides further context" if given else "")
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"{head}\n\n### Instruction:\n{row['instruction'].strip()}{middle}\n\n### Response:\n"


def instructions(path: Path) -> Task:
    """A causal language model's task: foresee the answers."""
    source: Source = Instructions(path)
    domain = Domain(path.stem, "id", {"all": source})
    return Task(path.stem, "instructions", (), ("token_accuracy",), (domain,), "instructions")
