"""What a sweep will run, and the errors that every cell would hit, found before the first of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.config import flag_of, merge_settings
from emoe.errors import UserError, nearest
from emoe.evaluation.sweep_config import OWN, Candidate, SweepConfig, Variant, require_crossed, seed_list, variants


@dataclass(frozen=True)
class Cell:
    """One seed of one candidate."""

    candidate: Candidate
    seed: int

    @property
    def name(self) -> str:
        """Folder and seed."""
        return f"{self.candidate.folder}, seed {self.seed}"


def settings_of(cell: Cell, output: Path) -> Any:
    """The `FinetuneConfig` of a cell.

    Raises:
        UserError: a value of the wrong kind.
    """
    from emoe.finetuning.settings import FinetuneConfig

    own = {"output": str(output / cell.candidate.folder), "seeds": str(cell.seed), "resume": True}
    return merge_settings(FinetuneConfig, {**cell.candidate.settings, **own})


def plan(config: SweepConfig) -> tuple[list[Variant], list[int], list[int]]:
    """Rows, seeds, and seeds to choose by.

    Raises:
        UserError: the file asks for what cannot be run; the arm is named.
    """
    seeds = seed_list(config.seeds, "seeds")
    first_seeds = seeds if config.select_seeds is None else seed_list(config.select_seeds, "select_seeds")
    if not set(first_seeds) <= set(seeds):
        raise UserError(f"sweep: select_seeds {config.select_seeds} must be among seeds {config.seeds}")
    rows = variants(config)
    for row in rows:
        for candidate in row.candidates:
            try:
                _check(row.arm, settings_of(Cell(candidate, seeds[0]), Path()))
            except UserError as error:
                raise UserError(f"sweep: arm '{row.arm}': {without_flags(str(error))}") from None
    for analysis in config.analysis:
        require_crossed(rows, analysis.x, analysis.lines)
    return rows, seeds, first_seeds


def _check(arm: str, settings: Any) -> None:
    """Raise `UserError` for names that nothing has; no data are read, no model is fetched."""
    from emoe import tasks
    from emoe.assets.resolve import check_name
    from emoe.finetuning import arms

    if arm in arms.ARMS and "method" not in settings.model_fields_set and arm != settings.method:
        raise UserError(f"it names no method and would be '{settings.method}'; write '{arm}: {{method: {arm}}}'")
    arms.get(settings.method)
    task = tasks.get(settings.task)
    known = [domain.name for domain in task.domains]
    for name in filter(None, (part.strip() for part in (settings.domains or "").split(","))):
        if name not in known:
            raise UserError(
                f"--domains: task '{task.name}' has no domain '{name}'{nearest(name, known)}; it has {', '.join(known)}"
            )
    check_name(settings.model)


def without_flags(text: str) -> str:
    """Settings as a sweep's file names them: `emoe sweep` has no flags for them."""
    from emoe.finetuning.settings import FinetuneConfig

    flags = {flag_of(key): key for key in FinetuneConfig.model_fields if key not in OWN}
    return re.sub(r"--[a-z][a-z-]*", lambda found: flags.get(found[0], found[0]), text)
