"""`emoe extend`: add random modules to each layer of a checkpoint; everything that was there stays, bit for bit.

New modules give nothing before they are trained (their output matrices are zero) and take no place from the old ones:
they come on top of the budget K. So the extended model says what the model said.

Their gates are random, or fitted on text (`emoe.surgery.gates`): open where the new modules are wanted, shut elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.companions import check_companions
from emoe.checkpoint.digests import check_digests
from emoe.config import FITTING, ExtendConfig
from emoe.errors import UserError
from emoe.surgery.asked import check_extension
from emoe.surgery.gates import fit_gates
from emoe.surgery.history import entry
from emoe.surgery.modules import Anatomy, ModuleSet, anatomy_of, append
from emoe.surgery.rewrite import Progress, Say, require_room, rewrite, workspace_of
from emoe.surgery.usage import fit_length


def extend(config: ExtendConfig, progress: Progress, say: Say = lambda line: None) -> dict[str, Any]:
    """Write ``config.output`` with more modules than ``config.model``. Returns the report that also lies there.

    Args:
        config: settings.
        progress: called with (stage, done, total).
        say: called with what will be written, a line, before anything is.

    Raises:
        UserError: nothing to add, a kind of module that the model does not have, one text without the other, too little
            of it, a gate that cannot be fitted, damaged weights, an output in the way, no room for it.
    """
    check_extension(config)
    wanted = {"ffn": config.experts, "attention": config.attention}
    folder = Path(config.model)
    anatomy = anatomy_of(folder)
    sets = anatomy.sets()
    if config.attention and not any(found.kind == "attention" for found in sets):
        raise UserError("--attention: this model has no attention experts; give --experts")
    if config.text:
        anatomy.check_gate_rows()
    workspace_of(folder, config.output, overwrite=config.overwrite).check_early()  # now: fitting takes its time
    scale = {slot.name: 1 + wanted[found.kind] / found.count for found in sets for slot in found.slots}
    require_room(folder, config.output, scale, say)
    digests = check_digests(folder)
    check_companions(folder)
    fitted = fit_gates(anatomy, config, {k for k, n in wanted.items() if n}, progress) if config.text else {}
    if fitted and sum(new for _, new, _ in fitted.values()) <= sum(old for _, _, old in fitted.values()):
        raise UserError("--old-text: no gate tells it from --text; give texts that differ more")
    groups = {found.name: (*found.groups, wanted[found.kind]) for found in sets}
    added = {kind: number for kind, number in wanted.items() if number}
    facts = config.model_dump(include=FITTING) if fitted else {}
    history = [*anatomy.history, entry("extend", folder, digests, added=added, seed=config.seed, **facts)]
    return rewrite(
        folder,
        config.output,
        _editor(anatomy, sets, wanted, config.seed, {name: row_C for name, (row_C, _, _) in fitted.items()}),
        anatomy.with_history(anatomy.rebuilt(groups), history),
        lambda target: anatomy.write_companions(target, {}),
        {
            "verb": "extend",
            "model": config.model,
            "added": added,
            "seed": config.seed,
            "settings": facts,
            "modules": {"before": sum(s.count for s in sets), "after": sum(map(sum, groups.values()))},
            "notes": notes_on(fitted, config.old_share)
            + (fit_length(folder, config.sequence_length)[1] if fitted else []),
            "gates": {name: {"new": new, "old": old} for name, (_, new, old) in fitted.items()},
        },
        scale=scale,
        overwrite=config.overwrite,
        progress=progress,
    )


def notes_on(fitted: dict[str, tuple[torch.Tensor, float, float]], share: float) -> list[str]:
    """How well the fitted gates tell the two texts apart, and each layer where they do not do what was asked."""
    if not fitted:
        return []
    new, old = (sum(found[place] for found in fitted.values()) / len(fitted) for place in (1, 2))
    notes = [f"gates open on {100 * new:.0f}% of the new text's tokens and {100 * old:.0f}% of the old text's (mean)"]
    for name, (_, new, old) in fitted.items():
        found = f"it opens on {100 * new:.1f}% of the new text's tokens and {100 * old:.1f}% of the old text's"
        if old > share:
            notes.append(f"{name}: no gate of this kind keeps to --old-share {share:g}; {found}")
        elif new <= old:
            notes.append(f"{name}: its gate does not tell the texts apart; {found}")
    return notes


def _editor(
    anatomy: Anatomy, sets: list[ModuleSet], wanted: dict[str, int], seed: int, fitted: dict[str, torch.Tensor]
):
    gates = {
        name: row
        for found in sets
        if found.name in fitted
        for name, row in anatomy.gate_row(found, fitted[found.name]).items()
    }
    rows = {slot.name: (slot, found) for found in sets for slot in found.slots if wanted[found.kind]}
    seed += 1000 * len(anatomy.history)  # a second extension is not the first one again

    def edit(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name in rows:
            slot, found = rows[name]
            tensor = append(tensor, slot, wanted[found.kind], found.count, found.size, seed)
            if name in gates:
                tensor[-wanted[found.kind] :] = gates[name].to(tensor.dtype)
        return name, tensor

    return edit
