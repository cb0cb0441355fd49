"""`emoe extend`: add random modules to each layer of a checkpoint; everything that was there stays, bit for bit.

New modules give nothing before they are trained (their output matrices are zero) and take no place from the old ones:
they come on top of the budget K. So the extended model says what the model said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emoe.config import ExtendConfig
from emoe.errors import UserError
from emoe.surgery.history import entry
from emoe.surgery.modules import Anatomy, ModuleSet, anatomy_of, append
from emoe.surgery.rewrite import Progress, rewrite


def extend(config: ExtendConfig, progress: Progress) -> dict[str, Any]:
    """Write ``config.output`` with more modules than ``config.model``. Returns the report that also lies there.

    Raises:
        UserError: nothing to add, a kind of module that the model does not have, an output in the way.
    """
    if not config.model:
        raise UserError("--model: missing; give the folder of a checkpoint with experts")
    wanted = {"ffn": config.experts, "attention": config.attention}
    if not any(wanted.values()):
        raise UserError("--experts: nothing to add; give --experts or --attention, at least 1")
    folder = Path(config.model)
    anatomy = anatomy_of(folder)
    sets = anatomy.sets()
    if config.attention and not any(found.kind == "attention" for found in sets):
        raise UserError("--attention: this model has no attention experts; give --experts")
    groups = {found.name: (*found.groups, wanted[found.kind]) for found in sets}
    added = {kind: number for kind, number in wanted.items() if number}
    history = [*anatomy.history, entry("extend", folder, added=added, seed=config.seed)]
    return rewrite(
        folder,
        config.output,
        _editor(anatomy, sets, wanted, config.seed),
        anatomy.with_history(anatomy.rebuilt(groups), history),
        lambda target: anatomy.write_companions(target, {}),
        {
            "verb": "extend",
            "model": config.model,
            "added": added,
            "seed": config.seed,
            "modules": {"before": sum(s.count for s in sets), "after": sum(map(sum, groups.values()))},
            "notes": [],
        },
        overwrite=config.overwrite,
        progress=progress,
    )


def _editor(anatomy: Anatomy, sets: list[ModuleSet], wanted: dict[str, int], seed: int):
    rows = {slot.name: (slot, found) for found in sets for slot in found.slots if wanted[found.kind]}
    seed += 1000 * len(anatomy.history)  # a second extension is not the first one again

    def edit(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name in rows:
            slot, found = rows[name]
            tensor = append(tensor, slot, wanted[found.kind], found.count, found.size, seed)
        return name, tensor

    return edit
