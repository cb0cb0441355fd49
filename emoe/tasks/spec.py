"""What a task is: labelled text of one domain to train on, and of others to see whether the training generalises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from emoe.assets.packages import Progress

Kind = Literal["classification", "regression", "instructions"]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text."""

    id: str
    """Unique within its domain and the same on every machine."""
    text: str
    """For instructions: the prompt."""
    pair: str | None
    """The second sentence of a pair; for instructions the answer; otherwise None."""
    label: int | float
    """Index into the task's labels; a number in regression; 0 for instructions."""


@dataclass(frozen=True)
class Where:
    """Where files may be found at run time."""

    data_dir: Path | None = None
    """Folder that replaces the hub, ``DIR/SET/SPLIT.csv`` and the like (``--data-dir``)."""
    progress: Progress | None = None
    """Called with one line when something slow starts."""


class Source(Protocol):
    """A place that labelled text comes from."""

    def read(self, where: Where) -> Iterator[Example]:
        """All examples, in the order of the files.

        Raises:
            NotThere: the set is not to be had; it can be left out.
            UserError: it is there, but not as described.
        """


class NotThere(Exception):  # noqa: N818 - a fact about a data set, not an error of the program
    """A data set that is neither on the disk nor to be fetched."""


@dataclass(frozen=True)
class Domain:
    """Text of one kind."""

    name: str
    role: Literal["id", "ood"]
    """The one ID domain is trained on; OOD domains are only ever tested on."""
    sources: Mapping[str, Source]
    """By part: "all", or "train" and, where the makers fixed them, "validation" and "test". What is missing is split
    off by hash; OOD domains have "test" only."""


@dataclass(frozen=True)
class Task:
    """Domains with the same labels."""

    name: str
    summary: str
    labels: tuple[str, ...]
    """Names of the classes; empty in regression and for instructions."""
    metrics: tuple[str, ...]
    """Names in `emoe.tasks.metrics`; the first is the score that selects and compares."""
    domains: tuple[Domain, ...]
    kind: Kind = "classification"

    @property
    def in_domain(self) -> Domain:
        """The domain that is trained on."""
        return next(domain for domain in self.domains if domain.role == "id")
