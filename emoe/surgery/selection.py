"""Which modules stay: from how much each was used on a task to the numbers of those that are kept.

Source: Shen et al., "ModuleFormer" (2023, arXiv 2306.04640), sec. 3.3: count activations on the task, normalise them by
the layer's maximum, drop what is under a threshold. Differences: normalising by the layer's sum, a fraction of the
whole model or of each layer instead of a threshold, and a floor that no layer goes below.

Legend: E modules of a set.
"""

from __future__ import annotations

from typing import Literal

import torch

from emoe.errors import UserError
from emoe.surgery.modules import ModuleSet

TIE = 1e-9
"""Shares of use nearer than this to each other are the same."""


def normalised(use_E: torch.Tensor, by: Literal["max", "sum"]) -> torch.Tensor:
    """Use over the layer's maximum or sum, (E,) fp64; 0 where the layer was not used at all."""
    use_E = use_E.double()
    return use_E / (use_E.max() if by == "max" else use_E.sum()).clamp_min(1e-30)


def select(
    sets: list[ModuleSet],
    use: dict[str, torch.Tensor],
    *,
    by: Literal["max", "sum"] | None,
    keep: float | None,
    threshold: float | None,
    scope: Literal["model", "layer"],
    floor: int,
) -> tuple[dict[str, list[int]], int]:
    """Name of a set → its modules that stay, ascending; and how many of them stay for the floor or as pinned ones only.

    Args:
        sets: all sets.
        use: how much each module was used, (E,), by name of the set.
        by: what it is divided by; None for numbers that are compared over layers as they are.
        keep: fraction of the modules that stay. Ties go to the module and the layer that come first.
        threshold: instead of `keep`: the normalised use that a module needs to stay.
        scope: whether `keep` is of the whole model or of each layer. Attention and FFN sets are ranked apart, since
            the numbers of modules that they use differ.
        floor: modules in the budget that every set keeps at least.

    Raises:
        UserError: nothing would stay, or a set would be left without modules in its budget.
    """
    score = {found.name: normalised(use[found.name], by) if by else use[found.name].double() for found in sets}
    if threshold is not None:
        best = max(score_E.max().item() for score_E in score.values())
        if threshold > best:
            raise UserError(f"--threshold: {threshold} removes all; the most used module has {best:.4g}")
        kept = {name: score_E >= threshold for name, score_E in score.items()}
    else:
        kept = {}
        for kind in sorted({found.kind for found in sets}):
            alike = [found for found in sets if found.kind == kind]
            for group in [alike] if scope == "model" else [[found] for found in alike]:
                kept |= _best(group, score, keep)
    staying = {found.name: _with_floor(found, kept[found.name], score[found.name], floor) for found in sets}
    return staying, sum(len(staying[found.name]) - int(kept[found.name].sum()) for found in sets)


def _best(sets: list[ModuleSet], score: dict[str, torch.Tensor], keep: float) -> dict[str, torch.Tensor]:
    """Masks of the best fraction of all modules of these sets."""
    pinned = [(torch.arange(found.count) < found.pinned).double() * 2 for found in sets]
    flat = torch.cat([score[found.name] + p_E for found, p_E in zip(sets, pinned, strict=True)])
    order = (flat / TIE).round().argsort(descending=True, stable=True)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[: max(1, round(keep * len(flat)))]] = True
    masks = chosen.split([found.count for found in sets])
    return {found.name: mask_E for found, mask_E in zip(sets, masks, strict=True)}


def _with_floor(found: ModuleSet, kept_E: torch.Tensor, score_E: torch.Tensor, floor: int) -> list[int]:
    """At least `floor` modules of the budget, and all that are pinned."""
    kept_E = kept_E | (torch.arange(found.count) < found.pinned)
    budget = found.groups[0]
    if floor > budget:
        raise UserError(f"--floor: layer {found.layer} has {budget} {found.kind} experts, fewer than {floor}")
    missing = floor - int(kept_E[:budget].sum())
    if missing > 0:
        rest_E = torch.where(kept_E[:budget], -1.0, score_E[:budget])
        kept_E[rest_E.argsort(descending=True, stable=True)[:missing]] = True
    if not kept_E[:budget].any():
        raise UserError(
            f"--floor: layer {found.layer} is left without {found.kind} experts; give --floor 1 or keep more"
        )
    return kept_E.nonzero().flatten().tolist()
