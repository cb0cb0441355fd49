"""Gate rows of modules to be added, fitted on the text that they are for and on text that is none of their business."""

from __future__ import annotations

from collections.abc import Callable

import torch

from emoe.config import ExtendConfig
from emoe.errors import UserError
from emoe.gating.opening import Opening
from emoe.surgery.modules import Anatomy
from emoe.surgery.usage import Progress, check_finite, load_model, no_cache, read_blocks

BATCH = 8
"""Sequences at once."""


@torch.no_grad()
def fit_gates(
    anatomy: Anatomy, config: ExtendConfig, kinds: set[str], progress: Progress
) -> dict[str, tuple[torch.Tensor, float, float]]:
    """By name of the set: its new modules' gate row, and the shares of new and old tokens that open it.

    Every other block is for the directions, the rest for the thresholds and the shares, which so are not those of the
    tokens that were fitted. Nothing but sums and two numbers a token are kept.

    Raises:
        UserError: too little text, a gate without rows of its own, or one that sees what is no number.
    """
    settings = {"length": config.sequence_length, "tokens": config.tokens, "seed": config.seed}
    texts = {
        True: read_blocks(anatomy.folder, config.text, **settings, flag="--text"),
        False: read_blocks(anatomy.folder, config.old_text, **settings, flag="--old-text"),
    }
    if min(map(len, texts.values())) < 2:
        raise UserError(f"--tokens: {config.tokens} is one block; give at least {2 * config.sequence_length}")
    model = load_model(anatomy.folder, head=False)
    found = {known.name: Opening() for known in anatomy.sets() if known.kind in kinds}

    def run(see: Callable[[Opening, torch.Tensor, bool], None], first: int, stage: str) -> None:
        for new, every_BT in texts.items():
            blocks_BT = every_BT[first::2]

            def tell(name: str, c_NC: torch.Tensor, new: bool = new) -> None:
                if name in found:
                    check_finite(name, c_NC)
                    see(found[name], c_NC, new)

            with anatomy.watch_gate_inputs(model, tell):
                for done, part_BT in enumerate(blocks_BT.split(BATCH)):
                    progress(stage, done * BATCH, len(blocks_BT))
                    model(part_BT.to(next(model.parameters()).device), **no_cache(model))

    run(Opening.add, 0, "telling texts apart")
    for opening in found.values():
        opening.solve()
    run(Opening.score, 1, "placing thresholds")
    return {name: opening.row(config.old_share) for name, opening in found.items()}
