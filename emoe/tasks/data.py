"""From a task to examples: splits fixed by hash, nothing of a test set left in training."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from emoe.errors import UserError, nearest
from emoe.tasks.spec import Domain, Example, Kind, NotThere, Task, Where

HELD_OUT = 0.1
"""Share of the ID examples split off for validation, and again for the test where the makers fixed none."""

Role = Literal["id-validation", "id-test", "ood"]


@dataclass(frozen=True)
class TestSet:
    """Examples to score on."""

    __test__ = False  # pytest would take it for a test

    role: Role
    examples: list[Example]


@dataclass(frozen=True)
class TaskData:
    """A task's examples."""

    task: Task
    train: list[Example]
    tests: dict[str, TestSet]
    """By name of the set, the ID validation set first."""
    duplicates_removed: dict[str, int]
    """By name of the set, scored or not: training examples left out because their text stands there, too."""
    notes: list[str] = field(default_factory=list)
    """What was left out and why, a line each."""

    @property
    def validation(self) -> TestSet:
        """The only set that may select anything."""
        return next(test for test in self.tests.values() if test.role == "id-validation")


def key_of(example: Example, kind: Kind = "classification") -> str:
    """What two texts share that differ in case, spaces and punctuation only; of an instruction, its prompt alone."""
    paired = example.pair is not None and kind != "instructions"
    text = f"{example.text}\n{example.pair}" if paired else example.text
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def place_of(key: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def load_task(
    task: Task,
    *,
    domains: Iterable[str] | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    where: Where | None = None,
    cleaned_of: Iterable[str] | None = None,
) -> TaskData:
    """Read, split, clean and limit.

    No text of a test set stays in training or validation, whether that set is wanted or not.

    Args:
        task: what to read.
        domains: OOD domains wanted; None for all. The ID domain is always read.
        train_limit: training examples kept, at most; those whose hash is smallest, whatever the seed.
        test_limit: likewise for each set that is scored.
        where: where files may be found.
        cleaned_of: OOD domains whose texts leave training, to make an earlier training set again; None for all that
            can be read.

    Raises:
        UserError: an unknown domain, no ID data, an empty split, an id that is there twice, or only one class to learn.
    """
    where = where or Where()
    wanted = _wanted(task, domains)
    known = {domain.name for domain in task.domains}
    cleaned = known if cleaned_of is None else known & set(cleaned_of)
    own = task.in_domain.name
    parts = _split(task.in_domain, where, task.kind)
    outside, notes = _outside(task, wanted, cleaned, where)
    reported = {own: TestSet("id-test", parts["test"])} | outside
    keys = {n: _keys(test.examples, task.kind) for n, test in reported.items() if n in cleaned | {own}}
    validation, doubled = _without(parts["validation"], keys, task.kind)  # what selects knows nothing of what reports
    if any(doubled.values()):
        counts = ", ".join(f"{name} {count}" for name, count in doubled.items() if count)
        notes.append(f"validation texts left out because they stand in a test set, too: {counts}")
    keys = {f"{own}-validation": _keys(validation, task.kind)} | keys
    train, removed = _without(parts["train"], keys, task.kind)
    train = _limited(train, train_limit, task.kind)
    tests = {f"{own}-validation": TestSet("id-validation", validation)} | reported
    tests = {
        name: TestSet(test.role, _limited(test.examples, test_limit, task.kind))
        for name, test in tests.items()
        if test.role != "ood" or name in wanted
    }
    _check(task, train, tests)
    return TaskData(task, train, tests, removed, notes)


def _outside(task: Task, wanted: set[str], cleaned: set[str], where: Where) -> tuple[dict[str, TestSet], list[str]]:
    """The OOD sets that are scored or that training is cleaned of, and a note on each that is not to be had."""
    sets, notes = {}, []
    for domain in task.domains:
        if domain.role == "id" or domain.name not in wanted | cleaned:
            continue
        try:
            sets[domain.name] = TestSet("ood", list(domain.sources["test"].read(where)))
        except NotThere as reason:
            lost = "is left out" if domain.name in wanted else "cannot be read, its texts may stand in training"
            notes.append(f"domain {domain.name} {lost}: {reason}")
        except UserError as reason:
            if domain.name in wanted:
                raise
            notes.append(f"domain {domain.name} cannot be read, its texts may stand in training: {reason}")
    return sets, notes


def _wanted(task: Task, domains: Iterable[str] | None) -> set[str]:
    known = [domain.name for domain in task.domains]
    wanted = set(known if domains is None else domains)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--domains: task '{task.name}' has no domain '{name}'{nearest(name, known)}; it has {', '.join(known)}"
            )
    return wanted


def _split(domain: Domain, where: Where, kind: Kind) -> dict[str, list[Example]]:
    """Train, validation and test of the ID domain; a text and its copies always fall into one of them."""
    try:
        parts = {part: list(source.read(where)) for part, source in domain.sources.items()}
    except NotThere as reason:
        raise UserError(f"--task: the domain to train on, {domain.name}: {reason}") from None
    pool = parts.pop("all", None)
    if pool is None:
        pool = parts.pop("train")
    held_out = [part for part in ("validation", "test") if part not in parts]
    split: dict[str, list[Example]] = {"train": [], **{part: [] for part in held_out}}
    for example in pool:
        part = int(place_of(key_of(example, kind)) / HELD_OUT)
        split[held_out[part] if part < len(held_out) else "train"].append(example)
    return split | parts


def _keys(examples: list[Example], kind: Kind) -> set[str]:
    return {key_of(example, kind) for example in examples}


def _without(examples: list[Example], keys: dict[str, set[str]], kind: Kind) -> tuple[list[Example], dict[str, int]]:
    """Examples that stand in none of the sets, and how many stand in each."""
    removed, kept = dict.fromkeys(keys, 0), []
    for example in examples:
        key = key_of(example, kind)
        found = [name for name in keys if key in keys[name]]
        for name in found:
            removed[name] += 1
        if not found:
            kept.append(example)
    return kept, removed


def _limited(examples: list[Example], limit: int | None, kind: Kind) -> list[Example]:
    if limit is None or len(examples) <= limit:
        return examples
    # Of another hash than the split's: the test set would otherwise be the lower end of its own interval anyway, and
    # copies of a text would come in together.
    chosen = sorted(examples, key=lambda example: place_of(f"limit {example.id} {key_of(example, kind)}"))[:limit]
    kept = {id(example) for example in chosen}
    return [example for example in examples if id(example) in kept]


def _check(task: Task, train: list[Example], tests: dict[str, TestSet]) -> None:
    for name, examples in {"training": train, **{name: test.examples for name, test in tests.items()}}.items():
        if not examples:
            raise UserError(
                f"--task: the {name} set of task '{task.name}' is empty; give more data or other files (a set that has "
                "no file is a tenth of the data, drawn by hash)"
            )
    for name, test in tests.items():
        identity, times = Counter(example.id for example in test.examples).most_common(1)[0]
        if times > 1:
            raise UserError(
                f"--task: the {name} set of task '{task.name}' has the id '{identity}' {times} times; runs are "
                "compared example by example, so name a column of different ids, or none"
            )
    if task.kind == "classification":
        classes = {example.label for example in train}
        if len(classes) < 2:
            only = task.labels[int(next(iter(classes)))]
            raise UserError(f"--task: every training example is '{only}'; there is nothing to learn from one class")
        seen = max(int(example.label) for test in tests.values() for example in test.examples)
        if seen >= len(task.labels):
            raise UserError(f"--task: a label {seen} in the files, but only {len(task.labels)} labels are named")
