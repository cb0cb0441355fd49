"""Kill a verb at a random moment, look at what lies there, let it go on, and compare with a run that was left alone."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from support.nursery import Nursery

CLOCK = {"when", "seconds", "seconds_per_step", "tokens_per_second", "peak_bytes", "peak_memory_bytes", "minutes"}
"""Keys of JSON files that differ from run to run."""


@dataclass(frozen=True)
class Verb:
    """One way of using the command line, as an entry of ``scripts/fault_drill.yaml`` tells it."""

    name: str
    command: str
    resume: list[str]
    """Flags with which an interrupted run is gone on with."""
    first: list[str] = field(default_factory=list)
    """Flags of the first run alone."""
    before: str | None = None
    """What lies at the output beforehand: "converted" for a converted checkpoint, which must survive until replaced."""
    grows: bool = False
    """The output may be seen unfinished; each file in it must be whole."""

    @classmethod
    def read(cls, path: Path) -> list[Verb]:
        """All verbs of a file."""
        return [cls(name, **fields) for name, fields in yaml.safe_load(path.read_text()).items()]


@dataclass
class Outcome:
    """What came of one kill."""

    verb: str
    moment: str
    left: str
    """What lay there after the kill: nothing, a finished output, the earlier output, or whole parts."""
    resumed: str
    problems: list[str]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in CLOCK}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file; of JSON and lines of JSON without what the clock says."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            parts = [data] if path.suffix == ".json" else data.splitlines()
            data = json.dumps([_plain(json.loads(part)) for part in parts], sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def damaged(folder: Path) -> list[str]:
    """Files of a growing output that are not whole."""
    bad = []
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    list(file.keys())
        except Exception as error:
            bad.append(f"{path.name} is not whole: {error}")
    return bad


class Drill:
    """All kills of some verbs. `inputs` are the paths named dense, converted and text."""

    def __init__(self, nursery: Nursery, inputs: dict[str, Path], folder: Path) -> None:
        self.nursery, self.inputs, self.folder = nursery, inputs, folder
        self._references: dict[str, tuple[dict[str, str], float, int]] = {}

    def _arguments(self, verb: Verb, output: Path, flags: list[str]) -> list[str]:
        return [part.format(output=output, **self.inputs) for part in verb.command.split()] + flags

    def _prepare(self, verb: Verb, place: Path) -> Path:
        place.mkdir(parents=True)
        if verb.before:
            shutil.copytree(self.inputs[verb.before], place / "out")
        return place / "out"

    def reference(self, verb: Verb) -> tuple[dict[str, str], float, int]:
        """Contents, seconds and changes to the disk of a run that nobody disturbs."""
        if verb.name not in self._references:
            place = self.folder / f"{verb.name.replace(' ', '')}-reference"
            output, events = self._prepare(verb, place), place.with_suffix(".events")
            start = time.perf_counter()
            done = self.nursery.run(*self._arguments(verb, output, verb.first), events=events)
            seconds = time.perf_counter() - start
            assert done.status == 0, f"{verb.name}: {done.text[-2000:]}"
            self._references[verb.name] = contents(output), seconds, int(events.read_text())
        return self._references[verb.name]

    def kill(self, verb: Verb, number: int, seed: int) -> Outcome:
        """Kill number `number` of a verb: even ones by the clock, odd ones at a change to the disk."""
        wanted, seconds, events = self.reference(verb)
        draw = random.Random(f"{seed}/{verb.name}/{number}")
        place = self.folder / f"{verb.name.replace(' ', '')}-{number}"
        output = self._prepare(verb, place)
        before = contents(output) if verb.before else None
        arguments = self._arguments(verb, output, verb.first)
        if number % 2:
            event = draw.randint(1, events)
            moment = f"change {event} of {events} to the disk"
            done = self.nursery.run(*arguments, die_at=event)
        else:
            share = draw.random()
            moment = f"{100 * share:.0f}% of its time"
            run = self.nursery.start(*arguments)
            time.sleep(share * seconds)
            run.kill()
            done = run.wait()
        problems = [] if done.status in (-9, 0) else [f"ended with {done.status}: {done.text[-500:]}"]
        left = self._left(verb, output, wanted, before, problems)
        resumed = self._go_on(verb, output, left, problems)
        if contents(output) != wanted:
            after = contents(output)
            problems.append(f"differs: {sorted(k for k in {*wanted, *after} if wanted.get(k) != after.get(k))}")
        if rest := sorted(p.name for p in place.iterdir() if p != output):
            problems.append(f"left behind: {rest}")
        shutil.rmtree(place)
        return Outcome(verb.name, moment, left, resumed, problems)

    def race(self, verb: Verb) -> Outcome:
        """Two processes at one output: one result, and whoever did not write it says so."""
        wanted, seconds, _ = self.reference(verb)
        place = self.folder / f"{verb.name.replace(' ', '')}-race"
        output = self._prepare(verb, place)
        runs = [self.nursery.start(*self._arguments(verb, output, verb.first))]
        time.sleep(0.3 * seconds)
        runs.append(self.nursery.start(*self._arguments(verb, output, verb.first)))
        ends = [run.wait() for run in runs]
        problems = [f"ended with {end.status}: {end.text[-500:]}" for end in ends if end.status and not end.refused]
        if not any(end.status == 0 for end in ends):
            problems.append("nobody wrote it")
        if contents(output) != wanted:
            problems.append("the output differs")
        if rest := sorted(p.name for p in place.iterdir() if p != output):
            problems.append(f"left behind: {rest}")
        said = next((end.complaints[0].split("; ")[0] for end in ends if end.refused), "came later and wrote the same")
        shutil.rmtree(place)
        return Outcome(verb.name, "twice at once", "", said.replace(f"{place}/", "").removeprefix("emoe: "), problems)

    def _left(self, verb: Verb, output: Path, wanted: dict, before: dict | None, problems: list[str]) -> str:
        strangers = [p.name for p in output.parent.iterdir() if p != output and not p.name.startswith(".")]
        problems += [f"{name} appeared" for name in strangers]
        if not output.exists():
            return "nothing"
        if verb.grows:
            problems += damaged(output)
            return "whole parts"
        found = contents(output)
        if found == wanted:
            return "the finished output"
        if found == before:
            return "the earlier output"
        problems.append("a half-finished output")
        return "half of an output"

    def _go_on(self, verb: Verb, output: Path, left: str, problems: list[str]) -> str:
        done = self.nursery.run(*self._arguments(verb, output, verb.resume))
        if done.status == 0:
            return "finished"
        if left == "the finished output" and done.refused:
            return "refused: it exists"
        problems.append(f"could not go on ({done.status}): {done.text[-500:]}")
        return "failed"
