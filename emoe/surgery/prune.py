"""`emoe prune`: take modules out of a checkpoint, with the rows of the weights, of the gate and of the partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.companions import check_companions
from emoe.checkpoint.digests import check_digests
from emoe.config import COUNTING, PruneConfig
from emoe.errors import UserError
from emoe.surgery import baselines
from emoe.surgery.asked import check_pruning
from emoe.surgery.budget import settle_budget
from emoe.surgery.history import entry, now
from emoe.surgery.modules import Anatomy, ModuleSet, anatomy_of, take
from emoe.surgery.rewrite import Progress, rewrite, workspace_of
from emoe.surgery.selection import select
from emoe.surgery.usage import count_use, fit_length, load_model, read_blocks, text_of


def prune(config: PruneConfig, progress: Progress) -> dict[str, Any]:
    """Write ``config.output`` with fewer modules than ``config.model``. Returns the report that also lies there.

    Raises:
        UserError: nothing to do, nothing left, too little text, damaged weights, an output in the way.
    """
    check_pruning(config)
    folder = Path(config.model)
    anatomy = anatomy_of(folder)
    now()  # a clock that cannot be read is told before counting
    workspace_of(folder, config.output, overwrite=config.overwrite).check_early()  # now: counting takes its time
    _check_against(config, anatomy)
    digests = check_digests(folder)
    check_companions(folder)
    if config.method.startswith("layers"):
        return baselines.drop_layers(anatomy, config, digests, progress)
    if config.method == "magnitude":
        return baselines.prune_neurons(anatomy, config, digests, progress)
    sets = anatomy.sets()
    kept, more = (_taken_back(sets, config.remove), 0) if config.remove else _selected(anatomy, config, progress)
    extensions = {None: None, "last": -1, "added": 1}[config.remove]
    groups = {found.name: found.groups_of(kept[found.name])[:extensions] for found in sets}
    rebuilt = anatomy.rebuilt(groups)
    notes = settle_budget(anatomy, rebuilt, groups, config.top_k) + _beyond(config, sets, more)
    if _counts(config):
        notes += fit_length(folder, config.sequence_length)[1]
    facts = config.model_dump(exclude={"model", "output", "overwrite"}, exclude_none=True)
    if config.remove:  # nothing is counted: the settings of counting had no part in it
        facts = {key: facts[key] for key in ("remove", "top_k") if key in facts}
    elif config.method == "random":
        facts = {key: value for key, value in facts.items() if key not in COUNTING}
    numbers = {name: len(modules) for name, modules in kept.items()}
    history = [*anatomy.history, entry("prune", folder, digests, settings=facts, kept=numbers)]
    return rewrite(
        folder,
        config.output,
        _editor(anatomy, kept, rebuilt),
        anatomy.with_history(rebuilt, history),
        lambda target: anatomy.write_companions(target, kept),
        {
            "verb": "prune",
            "model": config.model,
            "settings": facts,
            "modules": {"before": sum(s.count for s in sets), "after": sum(map(len, kept.values()))},
            "kept": kept,
            "notes": notes,
        },
        scale={slot.name: len(kept[found.name]) / found.count for found in sets for slot in found.slots},
        overwrite=config.overwrite,
        progress=progress,
    )


def _check_against(config: PruneConfig, anatomy: Anatomy) -> None:
    """Raise `UserError` for what this model has not, before its weights are read."""
    raw, sets = anatomy.config, anatomy.sets()
    if config.remove and all(len(found.groups) == 1 for found in sets):
        raise UserError("--remove: nothing was ever added to this model; use --keep or --threshold")
    if config.method == "magnitude":
        baselines.check_neurons(anatomy, config.keep)
    if not _counts(config):
        return
    if config.count == "energy" and any(found.kind == "attention" for found in sets):
        raise UserError("--count: attention experts have no energy of their own; give --count probability or hard")
    if config.count == "hard" and raw.get("num_experts_per_tok") == raw.get("num_experts", -1):
        raise UserError("--count: every token uses every expert of this model; give --count probability or energy")


def _counts(config: PruneConfig) -> bool:
    """Whether modules go by their use on text."""
    return not config.remove and config.method == "use" and config.keep != 1.0


def _beyond(config: PruneConfig, sets: list[ModuleSet], more: int) -> list[str]:
    """That more modules stay than were asked for."""
    if not more:
        return []
    asked = f"--keep {config.keep}" if config.threshold is None else f"--threshold {config.threshold}"
    pinned = " and those that are always chosen" if any(found.pinned for found in sets) else ""
    return [f"{more} more stay than {asked} alone keeps: --floor {config.floor} of each layer{pinned}"]


def _selected(anatomy: Anatomy, config: PruneConfig, progress: Progress) -> tuple[dict[str, list[int]], int]:
    """As `select`."""
    sets, by = anatomy.sets(), config.normalise
    if config.method == "random":
        generator = torch.Generator().manual_seed(config.seed)
        use, by = {found.name: torch.rand(found.count, generator=generator) for found in sets}, None
    elif config.keep == 1.0:
        return {found.name: list(range(found.count)) for found in sets}, 0
    else:
        use = _counted(anatomy, config, progress)
    return select(
        sets,
        use,
        by=by,
        keep=config.keep,
        threshold=config.threshold,
        scope=config.scope,
        floor=config.floor,
    )


def _counted(anatomy: Anatomy, config: PruneConfig, progress: Progress) -> dict[str, torch.Tensor]:
    settings = {"length": config.sequence_length, "tokens": config.tokens, "seed": config.seed}
    with text_of(config) as sources:
        blocks_BT = read_blocks(anatomy.folder, sources, **settings, flag="--task" if config.task else "--text")
    model = load_model(anatomy.folder, head=False)
    return count_use(anatomy, model, blocks_BT, kind=config.count, batch=config.batch_sequences, progress=progress)


def _taken_back(sets: list[ModuleSet], which: str) -> dict[str, list[int]]:
    """All but the modules that extensions added."""
    first = {found.name: sum(found.groups[: 1 if which == "added" else -1]) for found in sets}
    return {name: list(range(number)) for name, number in first.items()}


def _editor(anatomy: Anatomy, kept: dict[str, list[int]], rebuilt: dict[str, Any]):
    """Takes the rows of what goes out of a tensor."""
    rows = {slot.name: (slot, found) for found in anatomy.sets() for slot in found.slots}
    tables = anatomy.budget_tables()

    def edit(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name in rows:
            slot, found = rows[name]
            if len(kept[found.name]) < found.count:
                tensor = take(tensor, slot, kept[found.name], found.count, found.size)
        elif name in tables:
            tensor = tensor[: rebuilt["num_experts"]]
        return name, tensor

    return edit
