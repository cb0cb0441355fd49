"""Many fine-tuning runs from one file: resumable, one failure does not stop the rest, choices on ID validation only.

Cells (a candidate and a seed) run seed by seed, so that a sweep stopped half-way holds all arms at fewer seeds. Several
processes may run one sweep: each takes cells that no other is at. What is chosen with ``select`` is chosen for each arm
by the mean of its best ID-validation scores; test and OOD scores are not looked at.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import emoe
from emoe.errors import Busy, UserError
from emoe.evaluation.runs import AS_TRAINED, VALIDATION, is_done, read_record
from emoe.evaluation.sweep_config import Candidate, SweepConfig, Variant
from emoe.evaluation.sweep_plan import Cell, plan, settings_of, without_flags
from emoe.runtime import write_text

PAUSE = 20.0
"""Seconds between two looks at cells that another process is at."""

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]
Train = Callable[[Any, Progress, Say], Any]
"""Runs the one seed that a `FinetuneConfig` names and writes its folder."""


@dataclass
class SweepResult:
    """What became of a sweep; sweep.json has the same."""

    chosen: dict[str, str] = field(default_factory=dict)
    """Variant → folder of the candidate that was chosen."""
    selection: dict[str, dict[str, float]] = field(default_factory=dict)
    """Variant → candidate's folder → mean ID-validation score, in points."""
    failed: dict[str, str] = field(default_factory=dict)
    """Cell → what happened."""
    ran: int = 0
    """Cells that ran now; the others were there."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What is left to do."""

    done: list[str]
    left: list[str]
    """Cells to run; of a variant whose choice is open, as many as one candidate has."""
    seconds: float | None
    """None while nothing is known."""
    basis: str


def sweep(
    config: SweepConfig,
    output: Path,
    progress: Progress,
    report: Say = print,
    train: Train | None = None,
) -> SweepResult:
    """Run what is not there yet and choose. Writes ``output``/sweep.json.

    Args:
        report: told of each failed cell and of sets that are left out, in one line.
        train: default: `emoe finetune`'s function.

    Raises:
        UserError: the sweep itself is wrong, or a finished cell has other settings. A cell's own error does not
            come out; it is in the result.
    """
    rows, seeds, first_seeds = plan(config)
    for row in rows:
        for candidate in row.candidates:
            for seed in seeds:
                _check_finished(output, Cell(candidate, seed))
    output.mkdir(parents=True, exist_ok=True)
    result, start = SweepResult(), time.perf_counter()
    for row in rows:
        _choose(row, output, first_seeds, result, complete=True)
    _write(config, rows, result, output)  # a sweep that is killed can be compared as far as it got
    total = _cells_in_all(rows, seeds, first_seeds)
    runner = _Runner(train or _finetune(), output, result, progress, report, total)
    open_rows = [row for row in rows if len(row.candidates) > 1]
    runner.run([Cell(c, seed) for seed in first_seeds for row in open_rows for c in row.candidates])
    for row in rows:
        _choose(row, output, first_seeds, result)
    _write(config, rows, result, output)
    by_folder = {candidate.folder: candidate for row in rows for candidate in row.candidates}
    chosen = [by_folder[folder] for folder in result.chosen.values()]
    runner.run([Cell(candidate, seed) for seed in seeds for candidate in chosen])
    result.seconds = round(time.perf_counter() - start, 1)
    _write(config, rows, result, output)
    progress("done", total, total)
    return result


def estimate(config: SweepConfig, output: Path) -> Estimate:
    """What `sweep` would run, and how long that takes by the cells that have finished."""
    rows, seeds, first_seeds = plan(config)
    wanted: list[Cell] = []
    for row in rows:
        wanted += [Cell(c, seed) for c in row.candidates for seed in (first_seeds if len(row.candidates) > 1 else [])]
        likely = _likely(row, output, first_seeds)
        wanted += [Cell(likely, seed) for seed in seeds if Cell(likely, seed) not in wanted]
    for cell in wanted:
        _check_finished(output, cell)
    done = [cell for cell in wanted if is_done(_folder(output, cell))]
    left = [cell for cell in wanted if cell not in done]
    seconds = {}
    for cell in done:
        took = read_record(_folder(output, cell) / "run.json").seconds
        seconds.setdefault(cell.candidate.folder, []).append(took)
    everywhere = [value for values in seconds.values() for value in values]
    if everywhere:
        guess, basis = fmean(everywhere), f"mean of {len(done)} finished cells, of the same arm where there is one"
    else:
        guess, basis = config.seconds_per_run, "seconds_per_run of the file"
    if guess is None and left:
        return Estimate([c.name for c in done], [c.name for c in left], None, "no cell has finished")
    whole = sum(fmean(seconds.get(cell.candidate.folder, [guess])) for cell in left)
    return Estimate([c.name for c in done], [c.name for c in left], whole, basis)


def _finetune() -> Train:
    from emoe.finetuning.tune import finetune

    return finetune


def _cells_in_all(rows: list[Variant], seeds: list[int], first_seeds: list[int]) -> int:
    extra = sum((len(row.candidates) - 1) * len(first_seeds) for row in rows)
    return extra + len(rows) * len(seeds)


def _folder(output: Path, cell: Cell) -> Path:
    return output / cell.candidate.folder / f"seed-{cell.seed}"


def _check_finished(output: Path, cell: Cell) -> None:
    """A finished cell must have been run with the settings that the file has now."""
    folder = _folder(output, cell)
    if not is_done(folder):
        return
    from emoe.finetuning.settings import located

    recorded = located(read_record(folder / "run.json").settings)
    wanted = settings_of(cell, output).fingerprint()
    differing = [key for key in wanted if key in recorded and recorded[key] != wanted[key]]
    if differing:
        was = ", ".join(f"{key} {recorded[key]} (now {wanted[key]})" for key in differing)
        raise UserError(f"sweep: {folder} was run with {was}; choose another --output or remove that folder")


@dataclass
class _Runner:
    train: Train
    output: Path
    result: SweepResult
    progress: Progress
    report: Say
    total: int
    said: set[str] = field(default_factory=set)

    def run(self, cells: list[Cell]) -> None:
        """Those that have neither finished nor failed in this call. What another process runs is waited for."""
        while cells := [cell for cell in cells if self._is_open(cell)]:
            ran = sum(self._run(cell) for cell in cells if self._is_open(cell))
            if not ran:
                self.progress("waiting for another process", self.result.ran, self.total)
                time.sleep(PAUSE)

    def _say(self, line: str) -> None:
        """Once, whichever cells say it."""
        if line not in self.said:
            self.said.add(line)
            self.report(line)

    def _is_open(self, cell: Cell) -> bool:
        return not is_done(_folder(self.output, cell)) and cell.name not in self.result.failed

    def _run(self, cell: Cell) -> bool:
        """False if another process is at it."""

        def shown(stage: str, done: int, total: int) -> None:
            self.progress(f"{cell.name}: {stage} {done}/{total}", self.result.ran, self.total)

        self.progress(cell.name, self.result.ran, self.total)
        try:
            self.train(settings_of(cell, self.output), shown, self._say)
            self.result.ran += 1
        except Busy:
            return False
        except Exception as error:  # of whatever kind: the other cells are worth having
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.result.failed[cell.name] = kind + without_flags(" ".join(str(error).split()))
            log = self.output / "failed" / f"{cell.candidate.folder}-seed-{cell.seed}.txt"
            log.parent.mkdir(exist_ok=True)
            write_text(log, traceback.format_exc())
            self.report(f"failed: {cell.name}: {self.result.failed[cell.name]} ({log})")
        finally:
            gc.collect()  # the Trainer's reference cycles hold the model
        return True


def validation_score(seed_folder: Path) -> float:
    """Best ID-validation score of a finished seed, in points.

    Raises:
        UserError: the run has none.
    """
    scores = read_record(seed_folder / "run.json").readings[AS_TRAINED].values()
    found = [score.score for score in scores if score.role == VALIDATION]
    if not found:
        raise UserError(f"sweep: {seed_folder} has no ID-validation score to choose by")
    return 100 * fmean(found)


def _selection(row: Variant, output: Path, seeds: list[int]) -> dict[str, float]:
    """Candidate's folder → mean score, of candidates whose seeds have all finished."""
    folders = {c.folder: [output / c.folder / f"seed-{seed}" for seed in seeds] for c in row.candidates}
    complete = {name: paths for name, paths in folders.items() if all(map(is_done, paths))}
    return {name: fmean(map(validation_score, paths)) for name, paths in complete.items()}


def _choose(row: Variant, output: Path, seeds: list[int], result: SweepResult, complete: bool = False) -> None:
    """The only candidate, or the best on validation (the first of equals); if complete, not before all have run."""
    if len(row.candidates) == 1:
        result.chosen[row.name] = row.candidates[0].folder
        return
    scores = _selection(row, output, seeds)
    if scores and (len(scores) == len(row.candidates) or not complete):
        result.selection[row.name] = scores
        result.chosen[row.name] = max(scores, key=scores.__getitem__)


def _likely(row: Variant, output: Path, seeds: list[int]) -> Candidate:
    """The candidate chosen so far, or the first."""
    scores = _selection(row, output, seeds)
    return max(row.candidates, key=lambda c: scores.get(c.folder, float("-inf")))


def _write(config: SweepConfig, rows: list[Variant], result: SweepResult, output: Path) -> None:
    facts = {
        "emoe": emoe.__version__,
        "config": config.model_dump(),
        "chosen": result.chosen,
        "groups": _groups(rows, result.chosen),
        "selection": result.selection,
        "failed": result.failed,
        "seconds": result.seconds,
    }
    write_text(output / "sweep.json", json.dumps(facts, indent=1) + "\n")


def _groups(rows: list[Variant], chosen: dict[str, str]) -> dict[str, list[str]]:
    """Variants that are to be compared with one another: those at the same values of what all arms are crossed with."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.name in chosen:
            groups.setdefault(", ".join(f"{k} {v}" for k, v in row.shared_point.items()), []).append(row.name)
    return groups
