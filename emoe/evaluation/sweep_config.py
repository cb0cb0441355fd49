"""What a sweep is: arms to compare, settings crossed with them, settings chosen by ID validation, seeds.

A file such as configs/sweeps/sentiment_minilm.yaml::

    base: {model: minilm, task: sentiment, tuning: full}      # settings of `emoe finetune` for all
    arms:                                                     # what is compared, by name; the first is the baseline
      vanilla: {method: vanilla}
      emoe: {method: emoe}
    select: {learning_rate: [2.0e-5, 5.0e-5]}                 # chosen for each arm, on ID validation alone
    select_seeds: 0,1                                         # seeds that the choice is made on; default: all
    seeds: 0:10

``cross`` (for all arms, or under one arm) makes a run of every combination of values instead of choosing one.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe.errors import UserError, nearest
from emoe.plainfiles import read_yaml

ARM = "arm"
"""Stands for the arm's name where a crossed setting may be named."""

OWN = {"output", "seeds", "resume", "overwrite"}
"""Settings of `emoe finetune` that a sweep gives by itself."""


class Analysis(BaseModel):
    """A table and a plot to draw from the finished runs."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["gains", "routing", "readings"]
    """gains: differences from the baseline arm by what is crossed; routing: experts chosen over training; readings: the
    same weights read as dense, or as experts."""
    x: str = ARM
    """For gains: the crossed setting, or 'arm'."""
    lines: str | None = None
    """For gains: a second crossed setting, one line for each of its values."""


class SweepConfig(BaseModel):
    """One sweep, as its file has it."""

    model_config = ConfigDict(extra="forbid")

    base: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]]
    cross: dict[str, list[Any]] = Field(default_factory=dict)
    select: dict[str, list[Any]] = Field(default_factory=dict)
    select_seeds: str | None = None
    seeds: str = "0:5"
    seconds_per_run: float | None = None
    """Measured seconds of one seed of one arm, for the estimate of `--dry-run` while nothing has finished."""
    analysis: list[Analysis] = Field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """One set of settings of a variant; its folder holds a seed-S for each seed."""

    folder: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A row of the result: an arm at one combination of crossed values, and the candidates to choose from."""

    name: str
    arm: str
    point: dict[str, Any]
    """Crossed settings and their values here."""
    shared_point: dict[str, Any] = field(compare=False)
    """Those that are crossed with every arm: a variant is compared with the baseline arm at the same."""
    candidates: tuple[Candidate, ...] = field(compare=False)


def read_sweep(path: Path) -> SweepConfig:
    """A sweep's file, checked as far as that is possible without running it.

    Raises:
        UserError: unreadable, an unknown key or setting, no arms, an empty list.
    """
    values = read_yaml(path, "sweep")
    if not isinstance(values, dict):
        raise UserError(f"sweep: {path} must hold 'base:', 'arms:' and 'seeds:'; see configs/sweeps")
    for key in values:
        if key not in SweepConfig.model_fields:
            raise UserError(f"sweep: {path}: unknown key '{key}'{nearest(str(key), SweepConfig.model_fields)}")
    if "seeds" in values:
        values["seeds"] = str(values["seeds"])
    if values.get("select_seeds") is not None:
        values["select_seeds"] = str(values["select_seeds"])
    for key in ("base", "arms", "cross", "select"):  # YAML reads a name with nothing behind it as null
        if key in values:
            values[key] = {} if values[key] is None else values[key]
    if isinstance(values.get("arms"), dict):
        values["arms"] = {arm: {} if own is None else own for arm, own in values["arms"].items()}
    try:
        config = SweepConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"sweep: {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not config.arms:
        raise UserError(f"sweep: {path} has no arm")
    return config


def variants(config: SweepConfig) -> list[Variant]:
    """Every row of the sweep, the baseline arm's first.

    Raises:
        UserError: an unknown setting, one given twice, an empty list, or two rows of one name.
    """
    found = []
    for arm, given in config.arms.items():
        own = dict(given)
        crossed = own.pop("cross", None) or {}
        if not isinstance(crossed, dict):
            raise UserError(f"sweep: 'cross' of arm '{arm}' must name settings, each with a list of values")
        for settings in (config.base, own, crossed, config.cross, config.select):
            _check_names(settings)
        several: dict[str, Any] = {}
        for lists in (crossed, config.cross, config.select):
            for key, values in lists.items():
                if not isinstance(values, list) or not values:
                    raise UserError(f"sweep: '{key}' must be a list of values")
                if key == "method":
                    raise UserError("sweep: 'method' tells arms apart; give each method an arm of its own")
                if key in own or key in several:
                    raise UserError(f"sweep: '{key}' of arm '{arm}' is given twice: by itself, crossed or selected")
            several |= lists
        for shared in _combinations(config.cross):
            for point in _combinations(crossed):
                found.append(_variant(config, arm, own, shared, point))
    folders = [candidate.folder for variant in found for candidate in variant.candidates]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"sweep: two arms or values would both be called '{folder}'; rename one")
    return found


def require_crossed(rows: list[Variant], *keys: str | None) -> None:
    """Raise `UserError` for what is neither crossed in the sweep nor "arm"."""
    crossed = [ARM, *dict.fromkeys(key for row in rows for key in row.point)]
    for key in filter(None, keys):
        if key not in crossed:
            raise UserError(
                f"analysis: the sweep does not cross '{key}'{nearest(key, crossed)}; it crosses only: "
                f"{', '.join(crossed)}; add 'cross: {{{key}: […]}}'"
            )


def _variant(config: SweepConfig, arm: str, own: dict, shared: dict, point: dict) -> Variant:
    whole = {**shared, **point}
    name = ", ".join([arm, *(f"{key} {value}" for key, value in whole.items())])
    candidates = tuple(
        Candidate(slug("__".join([arm, *_words(whole), *_words(chosen)])), {**config.base, **own, **whole, **chosen})
        for chosen in _combinations(config.select)
    )
    return Variant(name, arm, whole, shared, candidates)


def _check_names(settings: dict[str, Any]) -> None:
    from emoe.finetuning.settings import FinetuneConfig

    for key in settings:
        if key in OWN:
            raise UserError(f"sweep: '{key}' is not for arms; the sweep sets it")
        if key not in FinetuneConfig.model_fields:
            raise UserError(f"sweep: unknown setting '{key}'{nearest(str(key), FinetuneConfig.model_fields)}")


def _combinations(lists: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _words(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def slug(text: str) -> str:
    """As part of a file's name."""
    return re.sub(r"[^\w.=+-]+", "-", text)


def seed_list(text: str, key: str) -> list[int]:
    """``0,1,2`` or ``0:5``, as `emoe finetune --seeds` takes them."""
    from emoe.finetuning.settings import FinetuneConfig

    try:
        return FinetuneConfig(seeds=text).seed_list()
    except UserError as error:
        raise UserError(str(error).replace("--seeds", f"sweep: {key}")) from None
