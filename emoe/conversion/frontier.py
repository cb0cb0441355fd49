"""Quality against active experts, for many ways of converting one model, in bounded memory.

Each *cell* of the grid is a conversion that is measured and not written, with its own settings and budget, calibrated
for that budget. A finished cell is a file, so that an interrupted grid goes on where it stood; what the first pass
found (`Survey`) serves all cells that differ in gate or budget alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import emoe
from emoe.checkpoint.writer import save_tensors
from emoe.config import ConvertConfig, resolve_config
from emoe.conversion.convert import prepare
from emoe.conversion.engine import CONVERT, Engine
from emoe.conversion.plan import Plan
from emoe.conversion.survey import Survey
from emoe.disk import full_disk_told
from emoe.errors import UserError, nearest, shortened
from emoe.plainfiles import read_json, read_yaml
from emoe.runtime import sole_writer, write_text

PLAIN = {"routing": "top-k", "allocation": "uniform", "prefix": "dense", "refine_rounds": 0}
"""What all converters before did: K experts for every token of every layer, fitted on the dense model."""

METHODS: dict[str, dict[str, Any]] = {
    "emoe": {},
    "EMoE as published": {"split": "weights", "gate": "average-key", **PLAIN},
    "MoEfication": {"split": "graph", "gate": "average-key", **PLAIN},
    "LLaMA-MoE": {"split": "random", "gate": "average-key", **PLAIN},
    "CMoE": {"split": "coactivation", "gate": "representative", "shared": 0.125, **PLAIN},
    "oracle on our split": {"gate": "oracle"},
    "oracle of neurons": {"split": "contiguous", "gate": "oracle", "experts": "neurons", **PLAIN},
}
"""Known ways by name. The peers are those papers' training-free choices of split and gate on our code; LLaMA-MoE, whose
gate is trained from scratch, gets average-key. ``shared`` is a share of the experts; ``neurons`` means one of each."""


@dataclass(frozen=True)
class Cell:
    """One way at one budget."""

    name: str
    settings: dict[str, Any]
    active: float

    @property
    def slug(self) -> str:
        """File name, readable and unique."""
        digest = hashlib.sha256(
            json.dumps([self.name, self.settings, self.active], sort_keys=True).encode()
        ).hexdigest()
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}-{round(100 * self.active)}-{digest[:8]}"


def read_grid(path: Path) -> dict[str, dict[str, Any]]:
    """Ways from a YAML file: names, and under each the settings of `emoe convert` that it changes.

    Raises:
        UserError: not such a file, or an unknown setting.
    """
    ways = read_yaml(path, "--grid")
    if not isinstance(ways, dict) or not all(isinstance(way, dict) for way in ways.values()):
        raise UserError(f"--grid: {path} must hold names with settings under them")
    for name, way in ways.items():
        for key in way:
            if key not in ConvertConfig.model_fields and key != "shared":
                raise UserError(
                    f"--grid: {path}: {shortened(name)} has unknown setting {shortened(key)}"
                    f"{nearest(str(key), ConvertConfig.model_fields)}"
                )
    return {str(name): way for name, way in ways.items()}


def known_methods(names: list[str]) -> dict[str, dict[str, Any]]:
    """Entries of `METHODS`; "all" for all.

    Raises:
        UserError: an unknown name.
    """
    if names == ["all"]:
        return METHODS
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: unknown '{name}'{nearest(name, METHODS)}. Known: all, {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


def frontier(
    base: dict[str, Any],
    ways: dict[str, dict[str, Any]],
    actives: list[float],
    output: Path,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Measure every way at every share of active experts. Returns, and writes to ``output``, a report of plain types.

    Args:
        base: settings that all ways share.
        ways: settings by name.
    """
    from emoe.report.frontier import write_frontier

    for active in actives:
        if not 0 < active <= 1:
            raise UserError(f"--active: {active} is not a share above 0 and at most 1")
    cells = [Cell(name, settings, active) for name, settings in ways.items() for active in actives]
    plans = [_plan(base, cell) for cell in cells]  # every bad setting comes up before any work
    if output.is_dir() and any(output.iterdir()) and not (output / "cells").is_dir():
        raise UserError(f"--output: {output} holds other things than a frontier; choose another folder")
    with full_disk_told(output, "start again: cells that are measured stay"), sole_writer(output):
        report = _report(base, _measure_all(cells, plans, output, progress))
        write_frontier(report, output)
    return report


def _measure_all(cells: list[Cell], plans: list[Plan], output: Path, progress) -> list[dict[str, Any]]:
    """What each cell found, measured now or before."""
    (output / "cells").mkdir(exist_ok=True)
    for stale in output.rglob(".*.tmp"):  # of a process that was killed: we are alone here
        stale.unlink()
    results = []
    for number, (cell, plan) in enumerate(zip(cells, plans, strict=True)):
        path = output / "cells" / f"{cell.slug}.json"
        facts = _facts(plan)
        found = read_json(path, "--output") if path.is_file() else {}
        if found.get("facts") != facts:
            label = f"{cell.name} at {100 * cell.active:.0f}%"
            shown = lambda stage, done, total, n=number, label=label: progress(  # noqa: E731
                f"{label}: {stage}", 100 * n + 100 * done // max(1, total), 100 * len(cells)
            )
            found = {"facts": facts, **_measure(plan, cell, output, shown)}
            write_text(path, json.dumps(found, indent=1) + "\n")
        results.append(found)
    return results


def _report(base: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": base["model"],
        "emoe": emoe.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dense": results[0]["dense"],
        "measure": results[0]["measure"],
        "tokens": results[0]["tokens"],
        "cells": [{k: v for k, v in r.items() if k not in ("facts", "dense", "measure", "tokens")} for r in results],
    }


def _plan(base: dict[str, Any], cell: Cell) -> Plan:
    settings = {**base, **cell.settings}
    if settings.get("experts") == "neurons":
        settings["experts"] = prepare(resolve_config({**base, "experts": 1})[0], measured=[1]).num_neurons
    share = settings.pop("shared", None)
    experts = settings.get("experts", ConvertConfig.model_fields["experts"].default)
    if share is not None:
        settings["shared_experts"] = max(1, round(share * experts))
    top_k = max(1, round(cell.active * experts))
    if settings.get("shared_experts"):  # a budget below the share leaves all but one to it
        settings["shared_experts"] = max(0, min(settings["shared_experts"], top_k - 1))
    config, _ = resolve_config({**settings, "top_k": top_k})
    if config.held_out_tokens == 0:
        raise UserError("--held-out-tokens: 0 leaves nothing to measure; give 2048 or more")
    return prepare(config, measured=[top_k])


def _facts(plan: Plan) -> dict[str, Any]:
    """What a cell's figures depend on."""
    texts = [Path(source) for source in (*plan.config.calibration, *plan.config.held_out)]
    files = {*plan.reader.shards.values(), *(path for path in texts if path.exists())}
    stamps = sorted([str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files)
    return {"emoe": emoe.__version__, "files": stamps, **plan.config.fingerprint()}


def _measure(plan: Plan, cell: Cell, output: Path, progress) -> dict[str, Any]:
    start = time.perf_counter()
    engine = Engine(plan, output, progress)
    engine.open()
    store = _SurveyStore(engine, output)
    store.load()
    quality = engine.run(layer_done=store.save_when_complete)
    tables = {"calibration": quality} | (quality.domains or {})
    return {
        "name": cell.name,
        "wanted": cell.active,
        "top_k": plan.top_k,
        "experts": plan.config.experts,
        "settings": cell.settings,
        "active": quality.rows[0].active,
        "ffn_flops": quality.rows[0].ffn_flops,
        "added_bytes": plan.gate_bytes(),
        "domains": {name: {"value": t.rows[0].value, "ratio": t.rows[0].ratio} for name, t in tables.items()},
        "dense": {name: t.dense for name, t in tables.items()},
        "tokens": {name: t.tokens for name, t in tables.items()},
        "measure": quality.measure,
        "seconds": round(time.perf_counter() - start, 1),
    }


class _SurveyStore:
    """Keeps what the first pass of one cell found for the others."""

    IGNORED = ("gate", "top_k", "active", "budget", "routing", "prefix", "compensate", "held_out", "held_out_tokens")

    def __init__(self, engine: Engine, output: Path) -> None:
        self.engine = engine
        facts = {k: v for k, v in engine.fingerprint().items() if k not in (*self.IGNORED, "allocation", "text")}
        facts |= {"magnitudes": engine.plan.needs_magnitudes, "rounds": engine.plan.refine_rounds}
        facts["calibration_digest"] = hashlib.sha256(engine.blocks.calibration.numpy().tobytes()).hexdigest()
        facts["allocation"] = engine.plan.allocation
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.path = output / "surveys" / f"{digest[:16]}.safetensors"

    def load(self) -> None:
        """Let the engine go straight to its second pass, if another cell has done the first."""
        if not self.engine.plan.needs_survey or not self.path.is_file():
            return
        survey = Survey()
        for name, tensor in _tensors(self.path):
            kind, _, index = name.partition("/")
            getattr(survey, kind)[int(index)] = tensor
        self.engine.survey, self.engine.phase = survey, CONVERT

    def save_when_complete(self) -> None:
        """After a layer: keep the survey once it has seen the last chosen layer."""
        survey = self.engine.survey
        if (
            self.engine.plan.needs_survey
            and len(survey.labels) == len(self.engine.plan.layers)
            and not self.path.exists()
        ):
            self.path.parent.mkdir(exist_ok=True)
            save_tensors(self.path, survey.tensors())


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)
