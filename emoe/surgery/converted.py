"""The anatomy of a converted model: an expert is a block of neurons of its layer's FFN and a row of the gate's tables.

Legend: N tokens, D model width, F hidden width, E experts of a layer, S neurons per expert, K experts chosen.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emoe import gating
from emoe.checkpoint.companions import source_config
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition, keep_experts
from emoe.checkpoint.reader import CheckpointReader
from emoe.errors import UserError
from emoe.families.neurons import neuron_axis
from emoe.gating.energies import ExpertEnergies
from emoe.modeling.ffn_emoe import SparseFFN
from emoe.modeling.modeling_emoe import code_files
from emoe.surgery.layers import renumbered
from emoe.surgery.modules import ModuleSet, Seen, Slot

GATE_ROWS = {"weight": "gate", "bias": "one", "scale": "one", "neuron": "neuron", "cosine.centroids.weight": "random"}
"""Tables of a router with a row an expert → what an added expert begins with. A discriminant that hardly depends on
the token and is 1, above the 0 that an added expert's logit must exceed: every token uses it until it has learnt."""

BUDGET_TABLES = ("bounds", "threshold")
"""Tables of a router with a row for each budget K, where layers or tokens get their own."""

GATE_TABLES = {
    **{name: gating.tables_of(name) for name in (*gating.NAMES, gating.SOFTMAX)},
    "cosine": ("cosine.projection.weight", "cosine.centroids.weight"),
}
"""Kind of gate → the tables that its router must have."""


class Converted:
    """Implements `emoe.surgery.modules.Anatomy`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        if config.get("emoe_copies"):
            raise UserError(f"--model: the experts of {folder} are copies of a whole FFN (gmoe); surgery is for parts")
        self.reader = CheckpointReader(folder, source_config(config))
        self.partition = Partition.load(folder / PARTITION)
        labels_F = next(iter(self.partition.labels.values()))
        self.size = len(labels_F) // self.partition.num_experts
        self._check_tables()

    def _check_tables(self) -> None:
        """Raise `UserError` where the gate that config.json speaks of lacks a table."""
        gate = self.config["emoe_gate"]
        if gate not in GATE_TABLES:
            raise UserError(f"--model: {self.folder}: unknown emoe_gate '{gate}'; known: {', '.join(GATE_TABLES)}")
        varies = self.config.get("emoe_routing") in ("threshold", "energy-share")
        varies = varies or self.config.get("emoe_allocation", "uniform") != "uniform"
        tables = (*GATE_TABLES[gate], *(BUDGET_TABLES if varies else ()))
        needed = [self.router_prefix(layer) + table for layer in self.config["emoe_layers"] for table in tables]
        missing = [name for name in needed if name not in self.reader.shards]
        if missing:
            raise UserError(
                f"--model: {self.folder} lacks tensor {missing[0]}, which the {gate} gate of its config.json needs; "
                "convert the model again"
            )

    def sets(self) -> list[ModuleSet]:
        """One for each converted layer."""
        layers = self.config["emoe_layers"]
        groups = self.config.get("emoe_groups") or [[self.config["num_experts"]]] * len(layers)
        pinned = self.config.get("emoe_shared_experts", 0)
        return [
            ModuleSet(layer, "ffn", tuple(group), self._slots(layer), self.size, pinned)
            for layer, group in zip(layers, groups, strict=True)
        ]

    def _slots(self, layer: int) -> tuple[Slot, ...]:
        spec, slots = self.reader.spec, []
        for name, (role, parameter) in self.reader.ffn_tensors(layer).items():
            axis = neuron_axis(spec, role, parameter)
            if axis is not None:
                fresh = "zero" if role == "down" or parameter == "bias" else "random"
                slots.append(Slot(name, axis, self.size, fresh, 2 if spec.fused and role == "up" else 1))
        for table, fresh in GATE_ROWS.items():
            name = f"{self.router_prefix(layer)}{table}"
            if name in self.reader.shards:
                slots.append(Slot(name, 0, 1, fresh))
        return tuple(slots)

    def router_prefix(self, layer: int) -> str:
        """What stands before the names of a layer's router tensors."""
        ffn = self.reader.spec.ffn
        return f"{self.reader.layer_prefix(layer)}{ffn + '.' if ffn else ''}router."

    def budget_tables(self) -> set[str]:
        """Tensors with a row for each budget K rather than for each expert."""
        prefixes = [self.router_prefix(layer) for layer in self.config["emoe_layers"]]
        return {f"{prefix}{table}" for prefix in prefixes for table in BUDGET_TABLES}

    def budgets(self) -> dict[str, str]:
        """See `Anatomy.budgets`."""
        return {"num_experts_per_tok": "ffn"}

    def rebuilt(self, groups: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """config.json for these groups; without a trace of surgery where they are what conversion gives."""
        config, ordered = dict(self.config), [list(group) for group in groups.values()]
        most = max(group[0] for group in ordered)
        if config.get("emoe_compensation") and most != config["num_experts"]:
            config["emoe_compensation_of"] = config.get("emoe_compensation_of") or config["num_experts"]
        config["num_experts"] = most
        config["num_experts_per_tok"] = min(config["num_experts_per_tok"], most)
        for key in ("emoe_groups", "emoe_expert_size"):
            config.pop(key, None)
        if any(group != [self.partition.num_experts] for group in ordered):
            config |= {"emoe_groups": ordered, "emoe_expert_size": self.size}
        return config

    def layers(self) -> tuple[str, int]:
        """See `Anatomy.layers`."""
        return f"{self.reader.prefix}{self.reader.spec.layers}.", self.reader.num_layers

    def with_layers(self, kept: list[int]) -> dict[str, Any]:
        """See `Anatomy.with_layers`.

        Raises:
            UserError: a model whose layers cannot be numbered anew, or no converted layer is left.
        """
        places = {old: new for new, old in enumerate(kept)}
        left = {found.name: found.groups for found in self.sets() if found.layer in places}
        if not left:
            raise UserError("--keep: no converted layer is left; keep more")
        layers = [places[layer] for layer in self.config["emoe_layers"] if layer in places]
        return renumbered(self.rebuilt(left), self.reader.config, kept) | {"emoe_layers": layers}

    def write_companions(self, target: Path, kept: dict[str, list[int]]) -> None:
        """The modelling files, and the partition: labels of pruned experts become `GONE`; added experts have none."""
        for file in code_files():
            shutil.copyfile(file, target / file.name)
        if not kept:
            shutil.copyfile(self.folder / PARTITION, target / PARTITION)
        else:
            for found in self.sets():
                labels_F = self.partition.labels[found.layer]
                there = [e for e in kept[found.name] if e <= int(labels_F.max())]
                self.partition.labels[found.layer] = keep_experts(labels_F, there)
            self.partition.save(target / PARTITION)
        if (self.folder / "emoe_config.yaml").is_file():
            shutil.copyfile(self.folder / "emoe_config.yaml", target / "emoe_config.yaml")

    @contextlib.contextmanager
    def watch(self, model: nn.Module, see: Callable[[str, Seen], None], *, energies: bool) -> Iterator[None]:
        """See `Anatomy.watch`. With energies every neuron is computed besides."""
        watched = model.sparse_ffns()
        try:
            for layer, ffn in watched.items():
                ffn.ffn = _Watcher(ffn, f"{layer}.ffn", see, energies)
            yield
        finally:
            for ffn in watched.values():
                vars(ffn).pop("ffn", None)

    @contextlib.contextmanager
    def without(self, model: nn.Module, name: str, module: int) -> Iterator[None]:
        """See `Anatomy.without`: the next best expert is chosen instead, where there is one."""
        ffn = model.sparse_ffns()[int(name.split(".")[0])]

        def choose_others(router: nn.Module, arguments: tuple, routing: Any) -> Any:
            out_E = torch.arange(router.num_experts, device=routing.logits_NE.device) == module
            experts_NK = router.choose(routing.logits_NE.masked_fill(out_E, -torch.inf))
            experts_NK = torch.where(experts_NK == module, -1, experts_NK)
            weights_NK = router.weights_of(routing.logits_NE, experts_NK) if router.weighs else routing.weights_NK
            return routing._replace(experts_NK=experts_NK, weights_NK=weights_NK)

        def silence(down: nn.Module, arguments: tuple) -> torch.Tensor:
            h_NES = arguments[0].unflatten(-1, (ffn.num_experts, -1)).clone()
            h_NES[..., module, :] = 0
            return h_NES.flatten(-2)

        if ffn.router.all_on:
            hook = ffn.linear("down").register_forward_pre_hook(silence)
        else:
            hook = ffn.router.register_forward_hook(choose_others)
        try:
            yield
        finally:
            hook.remove()

    def learn(self, model: nn.Module) -> None:
        """See `Anatomy.learn`; an average-key gate follows the neurons, which do learn, and a cosine gate trains."""
        if model.config.emoe_gate not in ("average-key", "cosine"):  # fine-tuning may have put in another than ours
            for ffn in model.sparse_ffns().values():
                ffn.router.learn()

    def gate_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """See `Anatomy.gate_parameters`; none with an average-key gate."""
        return [parameter for ffn in model.sparse_ffns().values() for parameter in ffn.router.parameters()]

    def check_gate_rows(self) -> None:
        """See `Anatomy.check_gate_rows`."""
        gate = self.config["emoe_gate"]
        if gate not in ("discriminant", "cosine", gating.SOFTMAX):
            raise UserError(
                f"--text: the {gate} gate of this model follows its neurons, nothing is to be fitted; leave it out"
            )

    @contextlib.contextmanager
    def watch_gate_inputs(self, model: nn.Module, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """See `Anatomy.watch_gate_inputs`: for a discriminant the layer's input and a 1, which its bias goes with."""
        gate = self.config["emoe_gate"]

        def tell(name: str, seen: Seen) -> None:
            x_ND = seen.x_ND.float()
            if gate == "cosine":
                see(name, routers[name].cosine.inputs(x_ND))
            elif gate == gating.SOFTMAX:
                see(name, x_ND)
            else:
                see(name, torch.cat([x_ND, torch.ones_like(x_ND[:, :1])], 1))

        routers = {f"{layer}.ffn": ffn.router for layer, ffn in model.sparse_ffns().items()}
        with self.watch(model, tell, energies=False):
            yield

    def gate_row(self, found: ModuleSet, row_C: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Anatomy.gate_row`."""
        prefix = self.router_prefix(found.layer)
        if self.config["emoe_gate"] == "cosine":
            return {f"{prefix}cosine.centroids.weight": row_C}
        if self.config["emoe_gate"] == gating.SOFTMAX:
            return {f"{prefix}weight": row_C}
        return {f"{prefix}weight": row_C[:-1], f"{prefix}bias": row_C[-1]}

    def watch_logits(self, model: nn.Module, see: Callable[[str, torch.Tensor], None]) -> Callable[[], None]:
        """See `Anatomy.watch_logits`. Where a gate has nothing to train, gradients reach what it looks at."""

        def tell(name: str):
            def hook(router: nn.Module, arguments: tuple, routing: Any) -> None:
                if router.training and torch.is_grad_enabled():
                    logits_NE = routing.logits_NE
                    if not logits_NE.requires_grad:
                        with torch.autocast(logits_NE.device.type, enabled=False):
                            logits_NE = router.logits(*arguments)
                    see(name, logits_NE)

            return hook

        ffns = model.sparse_ffns().items()
        hooks = [ffn.router.register_forward_hook(tell(f"{layer}.ffn")) for layer, ffn in ffns]
        return lambda: [hook.remove() for hook in hooks]

    def with_history(self, config: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
        """config.json with this provenance."""
        return config | {"emoe_provenance": {**(config.get("emoe_provenance") or {}), "history": history}}

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened to the checkpoint since it was made."""
        return (self.config.get("emoe_provenance") or {}).get("history", [])


class _Watcher:
    """Stands in for a layer's FFN: tells what the router does, then lets the FFN work."""

    def __init__(self, ffn: SparseFFN, name: str, see: Callable[[str, Seen], None], energies: bool) -> None:
        self.ffn, self.name, self.see = ffn, name, see
        self.energies = ExpertEnergies(ffn.weight_views().down_DF, ffn.num_experts) if energies else None

    @torch.no_grad()
    def _look(self, x: torch.Tensor) -> Seen:
        x_ND, router = x.reshape(-1, x.shape[-1]), self.ffn.router
        logits_NE = router.logits(x_ND, self.ffn)
        experts_NK, budgeted = router.choose(logits_NE), router.budgeted
        p_NE = torch.cat([logits_NE[:, :budgeted].softmax(-1), logits_NE[:, budgeted:].sigmoid()], 1)
        weights_NK = p_NE.gather(1, experts_NK.clamp_min(0))
        h_NF = self.ffn.hidden(x_ND).float() if self.energies else None
        energy_NE = self.energies(h_NF) if self.energies else None
        return Seen(x_ND, experts_NK, logits_NE, weights_NK, energy_NE, h_NF)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.see(self.name, self._look(x))
        return type(self.ffn).ffn(self.ffn, x)
