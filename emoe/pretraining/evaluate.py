"""A language model's loss on held-out text of several domains.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from emoe.distributed import Group
from emoe.moduleformer.usage import GateUsage
from emoe.tasks.metrics import perplexity


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    domains: dict[str, torch.Tensor],
    *,
    batch_sequences: int = 4,
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, Any]]:
    """By domain: ``perplexity`` of the next token, balancing losses left out, and ``gates`` as `GateUsage.take` gives.

    Args:
        domains: (sequences, T) token ids.
        batch_sequences: sequences a forward call.
        autocast: dtype of matrix products; None for the model's own.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    results, group = {}, Group()
    for name, tokens in domains.items():
        usage = GateUsage(model)
        try:
            sums = torch.zeros(2, dtype=torch.float64)
            for ids_BT in tokens.split(batch_sequences)[group.rank :: group.size]:
                ids_BT = ids_BT.to(device)
                cast = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
                with cast:
                    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                losses = torch.nn.functional.cross_entropy(
                    logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="sum"
                )
                sums += torch.tensor([losses.item(), ids_BT[:, 1:].numel()], dtype=torch.float64)
            group.total(sums)
            results[name] = {"perplexity": perplexity(*sums.tolist()), "gates": usage.take(group.total)}
        finally:
            usage.close()
    model.train(was_training)
    return results
