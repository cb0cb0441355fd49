"""The run folders that `emoe finetune` writes, read back and checked.

::

    runs/NAME/seed-S/run.json                              settings, cost and scores; written last: the run is done
    runs/NAME/seed-S/predictions/READING/DOMAIN.jsonl      {"id", "label", "prediction", …}, one line an example
    runs/NAME/seed-S/log.jsonl                             one line a logged step

A *reading* is how the tuned weights were run: as trained, with all experts on (``dense``), or a dense model's weights
cut into experts (``emoe``).

Legend: N examples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe.errors import UserError, nearest
from emoe.finetuning.arms import ARMS
from emoe.plainfiles import read_json

AS_TRAINED = "as-trained"
OOD, ID_TEST, VALIDATION = "ood", "id-test", "id-validation"

REMEDY = "make the run again with `emoe finetune … --overwrite`"


class Score(BaseModel):
    """How one reading did on one domain; scores as the metric has them, 1 is the best."""

    role: Literal["id-validation", "id-test", "ood"]
    metric: str
    examples: int
    score: float
    metrics: dict[str, float] = Field(default_factory=dict)


class DataDigests(BaseModel):
    """What tells texts apart that have the same names: sha256 over ids, texts and labels."""

    train: str
    sets: dict[str, str]


class Record(BaseModel):
    """run.json. Keys that this version does not know are left alone."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    task: str
    model: str
    method: str
    tuning: str
    seed: int
    settings: dict[str, Any]
    steps: int
    selected_step: int | None = None
    """Optimizer step whose weights were kept, by ID validation."""
    seconds: float
    seconds_per_step: float
    peak_memory_bytes: int
    trainable_parameters: int
    train_examples: int
    data: DataDigests | None = None
    """None in records of versions that took no digests: the texts are unknown."""
    duplicates_removed: dict[str, int] = Field(default_factory=dict)
    """Training texts left out because they stand in a test set, by domain."""
    notes: list[str] = Field(default_factory=list)
    """What was said while the data were read, such as sets that are left out."""
    processes: int = 1
    hardware: Any = None
    torch: str | None = None
    transformers: str | None = None
    emoe: str | None = None
    readings: dict[str, dict[str, Score]]


@dataclass(frozen=True)
class Predictions:
    """What one seed said of one domain: one label for each id, sorted by id."""

    ids_N: np.ndarray
    labels_N: np.ndarray
    predictions_N: np.ndarray
    classes: int
    """Labels that the task has: as many as an example has scores; where the file has none, those seen in it."""

    def take(self, ids: np.ndarray) -> Predictions:
        """The examples named, all of which must be here."""
        places = np.searchsorted(self.ids_N, ids)
        return Predictions(ids, self.labels_N[places], self.predictions_N[places], self.classes)


@dataclass(frozen=True)
class Run:
    """Finished seeds of one arm, under one reading."""

    name: str
    folder: Path
    reading: str
    records: dict[int, Record]
    unfinished: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the comparison must know of this run."""

    @property
    def first(self) -> Record:
        """The record of the smallest seed: for what all seeds share."""
        return self.records[min(self.records)]

    def scores(self, seed: int) -> dict[str, Score]:
        """Domain → score of this run's reading."""
        return self.records[seed].readings[self.reading]

    def predictions(self, seed: int, domain: str) -> Predictions:
        """Raw predictions of a seed on a domain.

        Raises:
            UserError: the file is missing or damaged, or names an example twice.
        """
        return read_predictions(self.folder / f"seed-{seed}" / "predictions" / self.reading / f"{domain}.jsonl")


def read_predictions(path: Path) -> Predictions:
    """One file of predictions, sorted by id.

    Raises:
        UserError: missing, damaged, empty, or an id stands there twice.
    """
    import pyarrow as pa
    from pyarrow import json

    wanted = pa.schema([("id", pa.string()), ("label", pa.float64()), ("prediction", pa.float64())])
    scores = pa.field("scores", pa.list_(pa.float64()))
    options = json.ParseOptions(explicit_schema=wanted.append(scores), unexpected_field_behavior="ignore")
    try:
        table = json.read_json(path, parse_options=options)
    except FileNotFoundError:
        raise UserError(f"compare: {path} is missing; {REMEDY}") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"compare: {path} is damaged ({_brief(error)}); {REMEDY}") from None
    if table.num_rows == 0:
        raise UserError(f"compare: {path} holds no prediction")
    ids, labels, predictions = (table[name].to_numpy(zero_copy_only=False) for name in wanted.names)
    if any(table[name].null_count for name in wanted.names) or not np.isfinite([labels, predictions]).all():
        raise UserError(f"compare: {path} has lines without id, label or a finite prediction; {REMEDY}")
    ids = ids.astype(str)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise UserError(f"compare: {path} names example '{twice[0]}' twice")
    first = table["scores"][0].as_py()  # files of other makers may have none
    seen = int(max(labels.max(), predictions.max())) + 1
    return Predictions(ids, labels[order], predictions[order], len(first) if first else seen)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def read_record(path: Path) -> Record:
    """One run.json.

    Raises:
        UserError: unreadable, or a field is missing or of the wrong kind.
    """
    try:
        return Record.model_validate(read_json(path, "compare"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"compare: {path} is not a record of a run: {where}: {first['msg']}") from None


def read_run(folder: Path, reading: str = AS_TRAINED, name: str | None = None) -> Run:
    """The finished seeds of a run folder.

    Raises:
        UserError: no such folder, no finished seed in it, or the reading is not there.
    """
    if not folder.is_dir():
        raise UserError(f"compare: {folder} is not a folder; give a run folder that `emoe finetune --output` wrote")
    seeds = {int(p.name[5:]): p for p in folder.iterdir() if re.fullmatch(r"seed-\d+", p.name) and p.is_dir()}
    done = {seed: read_record(path / "run.json") for seed, path in sorted(seeds.items()) if is_done(path)}
    if not done:
        inside = sorted({path.parents[1].name for path in folder.glob("*/seed-*/run.json")})
        hint = f"; it holds run folders, give those: {', '.join(inside)}" if inside else ""
        raise UserError(f"compare: {folder} has no finished run (no seed-*/run.json){hint}")
    asked, notes = reading, []
    if all(asked not in record.readings and _trained_so(record.method, asked) for record in done.values()):
        reading = AS_TRAINED
        notes.append(
            f"{name or folder.name} has no reading '{asked}': it was trained that way, so it is read as trained"
        )
    for seed, record in done.items():
        if reading not in record.readings:
            known = ", ".join(record.readings)
            raise UserError(
                f"--reading: {folder}/seed-{seed} has no reading '{reading}'{nearest(reading, record.readings)}. "
                f"It has: {known}"
            )
    return Run(name or folder.name, folder, reading, done, tuple(sorted(set(seeds) - set(done))), tuple(notes))


def _trained_so(method: str, reading: str) -> bool:
    """Whether a method's own way of training is this reading."""
    return method in ARMS and ARMS[method].reading == reading


def is_done(seed_folder: Path) -> bool:
    """Whether the seed of this folder has finished."""
    return (seed_folder / "run.json").is_file()


def read_runs(arguments: list[str], reading: str = AS_TRAINED) -> list[Run]:
    """Runs from ``FOLDER`` or ``FOLDER@READING``, each under a name of its own; a sweep's folder gives what it chose.

    Raises:
        UserError: as for `read_run`; the same folder and reading twice.
    """
    places: list[tuple[Path, str, str | None]] = []
    for argument in arguments:
        path, at, own = argument.rpartition("@")
        folder, own = (Path(argument), reading) if not at or Path(argument).exists() else (Path(path), own)
        if (folder / "sweep.json").is_file():
            places += [(folder / run, own, arm) for arm, run in _chosen(folder).items()]
        else:
            places.append((folder, own, None))
    keys = [(folder.resolve(), own) for folder, own, _ in places]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"compare: {key[0]} was given twice")
    names = _unique_names([folder for folder, _ in keys])
    if len(arguments) == 1:  # one sweep, whose arms have names
        names = [arm or name for name, (_, _, arm) in zip(names, places, strict=True)]
    runs = []
    for name, (folder, own, _) in zip(names, places, strict=True):
        runs.append(read_run(folder, own, name if own == reading else f"{name} read as {own}"))
    return runs


class SweepRecord(BaseModel):
    """What readers need of sweep.json."""

    model_config = ConfigDict(extra="ignore")

    chosen: dict[str, str]
    """Arm at its crossed values → run folder within the sweep's."""
    groups: dict[str, list[str]]
    """What all arms are crossed with → arms that may be compared there."""
    selection: dict[str, dict[str, float]] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)


def read_sweep_record(output: Path) -> SweepRecord:
    """The sweep.json of a sweep's folder, without the arms that have finished no seed so far.

    Raises:
        UserError: unreadable, or a field is missing or of the wrong kind.
    """
    path = output / "sweep.json"
    try:
        record = SweepRecord.model_validate(read_json(path, "compare"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"compare: {path} is no record of a sweep: {where}: {first['msg']}; run `emoe sweep` again"
        ) from None
    chosen = {arm: run for arm, run in record.chosen.items() if any(map(is_done, (output / run).glob("seed-*")))}
    groups = {group: [arm for arm in arms if arm in chosen] for group, arms in record.groups.items()}
    return record.model_copy(
        update={"chosen": chosen, "groups": {group: arms for group, arms in groups.items() if arms}}
    )


def _chosen(output: Path) -> dict[str, str]:
    """Arm → run folder of a sweep's only group."""
    facts = read_sweep_record(output)
    if not facts.chosen:
        raise UserError(
            f"compare: the sweep {output} has no finished run of an arm whose settings are chosen; go on with it"
        )
    if len(facts.groups) > 1:
        groups = "; ".join(facts.groups)
        raise UserError(
            f"compare: {output} crosses all arms with other settings ({groups}), which are not to be mixed; give "
            "the run folders of one of them, or read the sweep's own comparisons"
        )
    return facts.chosen


def _unique_names(folders: list[Path]) -> list[str]:
    """The last parts of each path, as many as tell all folders apart."""
    distinct = set(folders)
    depth = 1
    while len({folder.parts[-depth:] for folder in distinct}) < len(distinct):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]
