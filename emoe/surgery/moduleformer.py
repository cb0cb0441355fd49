"""The anatomy of a ModuleFormer: an expert of attention or of the FFN is a slice of stacked weights and a gate row.

Legend: N tokens, D model width, F hidden width of an expert, E experts of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emoe.checkpoint.reader import shard_map
from emoe.errors import UserError
from emoe.moduleformer.experts import ExpertFFN, ExpertPool
from emoe.moduleformer.router import Routing
from emoe.runtime import write_text
from emoe.surgery.modules import ModuleSet, Seen, Slot

KINDS = {"attention": ("att", "attn.q_proj", "att_hidden"), "ffn": ("mlp", "mlpf", "ffd_hidden")}
"""Kind of set → how the fields of the config call it, its module in a layer, the field of its width."""

GATE_ROWS = {"mlp": "w_gate.3.weight", "linear": "w_gate.0.weight", "gmm": "expert_centroids"}
"""Kind of gate → its tensor with a row an expert."""

ROWS = 256
"""Tokens whose hidden activations in all experts exist at a time."""


class ModuleFormer:
    """Implements `emoe.surgery.modules.Anatomy`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        if config.get("gate_type", "mlp") == "all":
            raise UserError(f"--model: {folder} has no gate (gate_type 'all'): nothing chooses among its experts")
        self.shards = shard_map(folder)
        head = "transformer.h.0.mlpf.experts.weight"
        self.prefix = "transformer." if head in self.shards else ""

    def sets(self) -> list[ModuleSet]:
        """Attention and FFN of each layer."""
        found = []
        for layer in range(self.config["n_layer"]):
            for kind, (short, module, width) in KINDS.items():
                groups = self.config.get(f"{short}_groups")
                group = groups[layer] if groups else [self.config[f"n_{short}_experts"]]
                start = f"{self.prefix}h.{layer}.{module}."
                slots = (
                    Slot(f"{start}experts.weight", 0, 1, "fan-in"),
                    Slot(f"{start}output_experts.weight", 0, 1, "zero"),
                    Slot(f"{start}gate.{GATE_ROWS[self.config.get('gate_type', 'mlp')]}", 0, 1, "random"),
                )
                found.append(ModuleSet(layer, kind, tuple(group), slots, self.config[width]))
        return found

    def budgets(self) -> dict[str, str]:
        """See `Anatomy.budgets`."""
        return {f"k_{short}": kind for kind, (short, _, _) in KINDS.items()}

    def budget_tables(self) -> set[str]:
        """None: a budget is one number."""
        return set()

    def rebuilt(self, groups: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """config.json for these groups; without a trace of surgery where every layer has one group of one size."""
        config = dict(self.config)
        for kind, (short, _, _) in KINDS.items():
            ordered = [list(group) for name, group in groups.items() if name.endswith(f".{kind}")]
            most = max(group[0] for group in ordered)
            config.pop(f"{short}_groups", None)
            if any(group != [most] for group in ordered):
                config[f"{short}_groups"] = ordered
            config[f"n_{short}_experts"] = most
            config[f"k_{short}"] = min(config[f"k_{short}"], most)
        return config

    def layers(self) -> tuple[str, int]:
        """See `Anatomy.layers`."""
        return f"{self.prefix}h.", self.config["n_layer"]

    def with_layers(self, kept: list[int]) -> dict[str, Any]:
        """See `Anatomy.with_layers`."""
        left = {found.name: found.groups for found in self.sets() if found.layer in kept}
        return self.rebuilt(left) | {"n_layer": len(kept)}

    def write_companions(self, target: Path, kept: dict[str, list[int]]) -> None:
        """The modelling files."""
        from emoe.modeling.modeling_moduleformer import code_files

        for name, text in code_files().items():
            write_text(target / name, text)

    def _pools(self, model: nn.Module) -> dict[str, ExpertPool]:
        """The loaded modules by name of their set."""
        base = getattr(model, "transformer", model)
        return {f"{i}.{kind}": block.get_submodule(KINDS[kind][1]) for i, block in enumerate(base.h) for kind in KINDS}

    @contextlib.contextmanager
    def watch(self, model: nn.Module, see: Callable[[str, Seen], None], *, energies: bool) -> Iterator[None]:
        """See `Anatomy.watch`. Attention experts have no energies: they are not known before one attends."""

        def tell(name: str, pool: ExpertPool):
            @torch.no_grad()
            def hook(gate: nn.Module, arguments: tuple, routing: Routing) -> None:
                x_ND = arguments[0]
                energy_NE = _energies(pool, x_ND) if energies and isinstance(pool, ExpertFFN) else None
                see(name, Seen(x_ND, routing.experts_NK, routing.logits_NE, routing.weights_NK, energy_NE, None))

            return hook

        hooks = [pool.gate.register_forward_hook(tell(name, pool)) for name, pool in self._pools(model).items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def without(self, model: nn.Module, name: str, module: int) -> Iterator[None]:
        """See `Anatomy.without`: the next best expert is chosen instead, where there is one."""

        def choose_others(gate: nn.Module, arguments: tuple, routing: Routing) -> Routing:
            out_E = torch.arange(gate.num_experts, device=routing.logits_NE.device) == module
            routing = gate.route(routing.logits_NE.masked_fill(out_E, -torch.inf))
            gone_NK = routing.experts_NK == module  # where there is no next best one; its weight may be 0 / 0
            experts_NK = routing.experts_NK.masked_fill(gone_NK, -1)
            return routing._replace(experts_NK=experts_NK, weights_NK=routing.weights_NK.masked_fill(gone_NK, 0))

        hook = self._pools(model)[name].gate.register_forward_hook(choose_others)
        try:
            yield
        finally:
            hook.remove()

    def learn(self, model: nn.Module) -> None:
        """Nothing to do: the gates are trained."""

    def gate_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """See `Anatomy.gate_parameters`."""
        return [parameter for pool in self._pools(model).values() for parameter in pool.gate.parameters()]

    def check_gate_rows(self) -> None:
        """Nothing to say: every gate has rows."""

    @contextlib.contextmanager
    def watch_gate_inputs(self, model: nn.Module, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """See `Anatomy.watch_gate_inputs`."""

        def tell(name: str):
            def hook(gate: nn.Module, arguments: tuple, routing: Routing) -> None:
                see(name, gate.inputs(arguments[0]))

            return hook

        hooks = [pool.gate.register_forward_hook(tell(name)) for name, pool in self._pools(model).items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def gate_row(self, found: ModuleSet, row_C: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Anatomy.gate_row`."""
        return {found.slots[-1].name: row_C}

    def watch_logits(self, model: nn.Module, see: Callable[[str, torch.Tensor], None]) -> Callable[[], None]:
        """See `Anatomy.watch_logits`."""

        def tell(name: str):
            def hook(gate: nn.Module, arguments: tuple, routing: Routing) -> None:
                if gate.training and torch.is_grad_enabled():
                    see(name, routing.logits_NE)

            return hook

        pools = self._pools(model).items()
        hooks = [pool.gate.register_forward_hook(tell(name)) for name, pool in pools]
        return lambda: [hook.remove() for hook in hooks]

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened to the checkpoint since it was made."""
        return (self.config.get("emoe_provenance") or {}).get("history", [])

    def with_history(self, config: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
        """config.json with this provenance."""
        return config | {"emoe_provenance": {**(config.get("emoe_provenance") or {}), "history": history}}


def _energies(pool: ExpertFFN, x_ND: torch.Tensor) -> torch.Tensor:
    """‖W₂ᵉ act(W₁ᵉ x)‖² of every expert, chosen or not, (N, E)."""
    into_EDF, out_EFD = pool.experts.weight.float(), pool.output_experts.weight.float()
    gram_EFF = out_EFD @ out_EFD.mT
    parts = []
    for x_RD in x_ND.float().split(ROWS):
        h_ERF = pool.act(x_RD @ into_EDF)
        parts.append(((h_ERF @ gram_EFF) * h_ERF).sum(-1).clamp_min_(0).T)
    return torch.cat(parts) if parts else x_ND.new_zeros(0, pool.num_experts)
