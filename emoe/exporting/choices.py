"""The experts that an export chooses, imposed on the model that it was made from.

Legend: N tokens, E experts, K experts chosen.

A model that chooses is not continuous. Two programs that add up in another order now and then choose differently where
two experts are equally good, one such choice moves a logit by units, and every later token sees it. How far an export
is from its model therefore says little about whether it is right. Two other numbers do: how far it is from the model
that makes *the same* choices, and how much worse by the model's own gate the choices are in which the two differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch


class Choices:
    """Notes what the routers of `export` choose in its last forward, for imposing it on `model`.

    Args:
        export: a stock mixture-of-experts of transformers, whose routers return logits, weights and experts.
        model: the converted model.
        shared: the model's first so many experts are always chosen, and are none of the export's.
    """

    def __init__(self, export: Any, model: Any, shared: int) -> None:
        self.shared = shared
        self.made = self.changed = 0
        """Choices compared, one a token and layer, and those of them in which model and export differ."""
        self.margin = 0.0
        """How far, in a choice that differs, the least of the export's experts lies behind the best one that it left
        out, by the model's own logits: the largest, in standard deviations of that token's logits."""
        self._routers = [ffn.router for ffn in model.sparse_ffns().values()]
        self._experts: list[torch.Tensor | None] = [None] * len(self._routers)
        stock = [module for module in export.modules() if type(module).__name__.endswith("TopKRouter")]
        for place, router in enumerate(stock):
            router.register_forward_hook(partial(self._note, place))

    def _note(self, place: int, module: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        chosen_NK = output[2] + self.shared
        always_NK = torch.arange(self.shared).expand(len(chosen_NK), -1)
        self._experts[place] = torch.cat([always_NK, chosen_NK], 1)

    @contextlib.contextmanager
    def imposed(self) -> Iterator[None]:
        """The model chooses what the export chose for the same text just before."""
        for router, experts_NK in zip(self._routers, self._experts, strict=True):
            router.choose = partial(self._choose, router, experts_NK)
        try:
            yield
        finally:
            for router in self._routers:
                del router.choose  # the class's own is found again

    def _choose(self, router: Any, experts_NK: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
        chosen_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, experts_NK, True)
        own_NE = torch.zeros_like(chosen_NE).scatter(1, type(router).choose(router, logits_NE), True)
        differs_N = (own_NE != chosen_NE).any(1)
        self.made += len(differs_N)
        self.changed += int(differs_N.sum())
        if differs_N.any():
            logits_NE, chosen_NE = (t[differs_N, self.shared :] for t in (logits_NE, chosen_NE))
            best_N = logits_NE.masked_fill(chosen_NE, -torch.inf).amax(1)
            least_N = logits_NE.masked_fill(~chosen_NE, torch.inf).amin(1)
            margin_N = (best_N - least_N) / logits_NE.std(1).clamp_min(1e-30)  # a token without any gate has no margin
            self.margin = torch.maximum(margin_N.max(), margin_N.new_tensor(self.margin)).item()  # keeps a NaN
        return experts_NK
