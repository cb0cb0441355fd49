"""The softmax gate: a linear router whose softmax weighs the experts that it chooses, as in Mixtral (Jiang et al. 2024,
arXiv 2401.04088, sec. 2.1). Recovery trains it; stock mixtures-of-experts then hold the model without loss.

Legend: N tokens, B sequences, T tokens of a sequence, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from emoe import gating
from emoe.errors import UserError
from emoe.modeling.modeling_emoe import EMoEModelMixin
from emoe.modeling.routing_emoe import Router

TOKENS = 2048
"""Of the training text, on which the first table is fitted."""

SPREAD = 0.02
"""Standard deviation of a token's logits at the start: the weights of the chosen lie some 2% apart, so that the model
says what it said. SmolLM2, 32 of 64 experts: perplexity 26.05 before; 25.98 with this spread, 40.9 with 0.1."""

RIDGE = 1e-3
"""Share of the mean square of an input's entries that is added to their covariance."""


def check(facts: dict[str, Any], top_ks: list[int]) -> None:
    """Raise `UserError` for a model whose gate has no softmax gate to begin with, or where it would learn nothing.

    Args:
        facts: config.json of the converted checkpoint.
        top_ks: numbers of experts with which it is to be trained.
    """
    gate, again = facts["emoe_gate"], "convert it again with"
    routing, allocation = facts.get("emoe_routing", "top-k"), facts.get("emoe_allocation", "uniform")
    ways = [
        (gate == gating.SOFTMAX, "this model has one already; use learned"),
        (
            not any(1 < k < facts["num_experts"] for k in top_ks),
            "one expert alone has the weight 1, and with all on no gate is asked: nothing would be learned; give "
            "--budgets in between",
        ),
        (
            gate not in ("average-key", "discriminant"),
            f"the {gate} gate of this model is not linear; {again} --gate discriminant",
        ),
        (
            (routing, allocation) != ("top-k", "uniform"),
            f"the number of experts differs by token or layer; {again} --routing top-k --allocation uniform",
        ),
        (
            bool(facts.get("emoe_shared_experts")),
            f"experts that are always chosen have no weight; {again} --shared-experts 0",
        ),
        (
            any(len(group) > 1 for group in facts.get("emoe_groups") or []),
            "this model has added experts, whose gates stand beside a softmax; remove them (emoe prune --remove added)",
        ),
    ]
    wrong = next((why for found, why in ways if found), None)
    if wrong:
        raise UserError(f"--gates: softmax: {wrong}")


@torch.no_grad()
def install(model: EMoEModelMixin, tokens_BT: torch.Tensor) -> None:
    """Give each router of a model a softmax gate that chooses nearly what its gate chose, with nearly equal weights.

    Args:
        model: its gates are average-key or discriminant, and its K, with which the text is run, is below E.
        tokens_BT: text on which the biases are fitted, of which `TOKENS` tokens are used.
    """
    for router, (rows_ED, x_ND) in _rows_and_inputs(model, tokens_BT[: -(-TOKENS // tokens_BT.shape[1])]).items():
        rows_ED = rows_ED - rows_ED.mean(0)  # what all experts have in common changes neither choice nor weights
        spread = (x_ND @ rows_ED.T).std(1, correction=0).mean()
        for name in gating.tables_of(router.gate):
            delattr(router, name)
        router.register_buffer("weight", rows_ED * (SPREAD / spread.clamp_min(1e-30)))
        router.gate = gating.SOFTMAX
    model.config.emoe_gate = gating.SOFTMAX


def _rows_and_inputs(model: EMoEModelMixin, tokens_BT: torch.Tensor) -> dict[Router, tuple[torch.Tensor, torch.Tensor]]:
    """Each router's rows (E, D), without bias, and what came into it, (N, D); both fp32."""
    ffns = {ffn.router: ffn for ffn in model.sparse_ffns().values()}
    seen: dict[Router, list[torch.Tensor]] = {router: [] for router in ffns}
    hooks = [router.register_forward_hook(lambda r, given, _: seen[r].append(given[0].float())) for router in ffns]
    training = model.training
    try:
        for row_1T in tokens_BT.split(1):
            model.eval()(row_1T.to(model.device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    found = {}
    for router, parts in seen.items():
        x_ND = torch.cat(parts)
        if router.gate == "discriminant":
            rows_ED = router.weight + torch.outer(router.bias, constant(x_ND))
        else:
            rows_ED = ffns[router].weight_views().keys_FD.unflatten(0, (router.num_experts, -1)).float().mean(1)
        found[router] = (rows_ED, x_ND)
    return found


def constant(x_ND: torch.Tensor) -> torch.Tensor:
    """The v (D,) for which x · v is nearest to 1 (ridge regression): a bias for a router that has none."""
    x_ND = x_ND.double()
    gram_DD = x_ND.T @ x_ND / len(x_ND)
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    return torch.linalg.solve(gram_DD, x_ND.mean(0)).float()
