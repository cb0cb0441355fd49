"""The budget K of a checkpoint whose modules became fewer."""

from __future__ import annotations

from typing import Any

from emoe.errors import UserError
from emoe.surgery.modules import Anatomy


def settle_budget(
    anatomy: Anatomy, rebuilt: dict[str, Any], groups: dict[str, tuple[int, ...]], top_k: int | None
) -> list[str]:
    """Set K in the new config.json; what there is to say about it.

    Args:
        anatomy: of the checkpoint as it was.
        rebuilt: its new config.json, where K is clipped to what is left.
        groups: what every set has left, by its name.
        top_k: the K that is wanted; None for the old one.

    Raises:
        UserError: no layer has so many modules left.
    """
    notes = []
    for key, kind in anatomy.budgets().items():
        left = {name.split(".")[0]: group[0] for name, group in groups.items() if name.endswith(kind)}
        most, before = max(left.values()), anatomy.config[key]
        if top_k is not None:
            if top_k > most:
                raise UserError(f"--top-k: {top_k} is more than the {most} experts that remain")
            rebuilt[key] = top_k
        elif rebuilt[key] < before:
            notes.append(f"{key} clipped from {before} to {rebuilt[key]}: no layer has more {kind} experts left")
        short = [layer for layer, number in left.items() if number < rebuilt[key]]
        if short:
            notes.append(f"{key} {rebuilt[key]} is clipped to what is left in layers {', '.join(short)}")
    return notes + _clip_sampling(anatomy, rebuilt)


def _clip_sampling(anatomy: Anatomy, rebuilt: dict[str, Any]) -> list[str]:
    """A ModuleFormer draws ``sample_topk`` of its K experts in training, so no more than K."""
    before = anatomy.config.get("sample_topk", 0)
    least = min(rebuilt[key] for key in anatomy.budgets())
    if before <= least:
        return []
    rebuilt["sample_topk"] = least
    return [f"sample_topk clipped from {before} to {least}: no more experts are drawn than are used"]
