"""From a task to examples: splits fixed by hash, nothing of a test set left in training."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from emoe.errors import UserError, nearest
from emoe.tasks.spec import Domain, Example, NotThere, Task, Where

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
    """By name of the set: training examples left out because their text stands there, too."""
    notes: list[str] = field(default_factory=list)
    """What was left out and why, a line each."""

    @property
    def validation(self) -> TestSet:
        """The only set that may select anything."""
        return next(test for test in self.tests.values() if test.role == "id-validation")


def key_of(example: Example) -> str:
    """What two texts share that differ in case, spaces and punctuation only."""
    text = f"{example.text}\n{example.pair}" if example.pair is not None else example.text
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
) -> TaskData:
    """Read, split, clean and limit.

    Args:
        task: what to read.
        domains: OOD domains wanted; None for all. The ID domain is always read.
        train_limit: training examples kept, at most; those whose hash is smallest, whatever the seed.
        test_limit: likewise for each set that is scored.
        where: where files may be found.

    Raises:
        UserError: an unknown domain, no ID data, an empty split, an id that is there twice, or only one class to learn.
    """
    where = where or Where()
    wanted = _wanted(task, domains)
    notes: list[str] = []
    own = task.in_domain
    parts = _split(own, where)
    tests = {f"{own.name}-validation": TestSet("id-validation", parts["validation"])}
    tests[own.name] = TestSet("id-test", parts["test"])
    for domain in task.domains:
        if domain.role == "ood" and domain.name in wanted:
            try:
                tests[domain.name] = TestSet("ood", list(domain.sources["test"].read(where)))
            except NotThere as reason:
                notes.append(f"domain {domain.name} is left out: {reason}")
    if "validation" not in own.sources and "test" in own.sources:  # what selects must not know the makers' test texts
        known = {key_of(example) for example in parts["test"]}
        drawn = [example for example in parts["validation"] if key_of(example) not in known]
        tests[f"{own.name}-validation"] = TestSet("id-validation", drawn)
    train, removed = _without(parts["train"], tests)
    train = _limited(train, train_limit)
    tests = {name: TestSet(test.role, _limited(test.examples, test_limit)) for name, test in tests.items()}
    _check(task, train, tests)
    return TaskData(task, train, tests, removed, notes)


def _wanted(task: Task, domains: Iterable[str] | None) -> set[str]:
    known = [domain.name for domain in task.domains]
    wanted = set(known if domains is None else domains)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--domains: task '{task.name}' has no domain '{name}'{nearest(name, known)}; it has {', '.join(known)}"
            )
    return wanted


def _split(domain: Domain, where: Where) -> dict[str, list[Example]]:
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
        part = int(place_of(key_of(example)) / HELD_OUT)
        split[held_out[part] if part < len(held_out) else "train"].append(example)
    return split | parts


def _without(train: list[Example], tests: dict[str, TestSet]) -> tuple[list[Example], dict[str, int]]:
    keys = {name: {key_of(example) for example in test.examples} for name, test in tests.items()}
    removed, kept = dict.fromkeys(tests, 0), []
    for example in train:
        key = key_of(example)
        found = [name for name in keys if key in keys[name]]
        for name in found:
            removed[name] += 1
        if not found:
            kept.append(example)
    return kept, removed


def _limited(examples: list[Example], limit: int | None) -> list[Example]:
    if limit is None or len(examples) <= limit:
        return examples
    # Of another hash than the split's: the test set would otherwise be the lower end of its own interval anyway, and
    # copies of a text would come in together.
    chosen = sorted(examples, key=lambda example: place_of(f"limit {example.id} {key_of(example)}"))[:limit]
    kept = {id(example) for example in chosen}
    return [example for example in examples if id(example) in kept]


def _check(task: Task, train: list[Example], tests: dict[str, TestSet]) -> None:
    for name, examples in {"training": train, **{name: test.examples for name, test in tests.items()}}.items():
        if not examples:
            raise UserError(f"--task: the {name} set of task '{task.name}' is empty; give more data or other files")
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
