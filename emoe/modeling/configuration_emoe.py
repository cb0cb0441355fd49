"""Configuration of an Emergent Mixture-of-Experts: a stock transformers configuration plus the fields of `EMoEFields`.

``EMoELlamaConfig`` is ``LlamaConfig`` with these fields and ``model_type = "emoe_llama"``; likewise for every other
stock configuration. The classes are made on first use, by name, so that one file serves every family. This file and its
neighbour ``modeling_emoe.py`` are copied beside each converted checkpoint and need nothing but torch and transformers.
"""

import transformers

PREFIX = "EMoE"


class EMoEFields:
    """What a converted model's config.json says beyond its source's."""

    num_experts: int = 1
    """E: experts a converted layer, equal blocks of F / E neurons."""
    num_experts_per_tok: int = 1
    """K: experts a token uses, 1 to E; the average over tokens and layers where it varies. At K = E the model is the
    dense model."""
    emoe_layers: list | None = None
    """Indices of the converted layers; the others are dense."""
    emoe_gate: str = "average-key"
    """How experts are chosen: "average-key", "representative", "discriminant" or, trained, "cosine" and "softmax"."""
    emoe_routing: str = "top-k"
    """How many experts a token gets: "top-k" (K), "threshold" or "energy-share" (as many as it needs, K on average); as
    ablations of top-k: "bottom-k" and "random"."""
    emoe_allocation: str = "uniform"
    """How the budget K is shared among layers: "uniform", or "sensitivity" (each layer its own, K on average)."""
    emoe_shared_experts: int = 0
    """The first so many experts are always chosen, and count towards K."""
    emoe_compensation: int = 0
    """Budget K at which routers hold the mean output of skipped experts, which is added; 0 for none."""
    emoe_compensation_of: int | None = None
    """Experts that a layer had when `emoe_compensation` was measured; None: `num_experts`."""
    emoe_groups: list | None = None
    """Experts of each layer in `emoe_layers` after surgery: [in the budget, added first, added next, …]. Added experts
    come on top of the budget K. None: `num_experts` in the budget of every layer, none added."""
    emoe_expert_size: int | None = None
    """S: neurons of an expert, where `emoe_groups` is given; a layer's FFN is then S times its experts wide."""
    emoe_copies: int = 0
    """GMoE: every expert is a copy of the whole FFN, and there are so many; 0 for experts that are parts of it."""
    emoe_ffn: dict | None = None
    """Where the FFN of this family lives: names of its modules, as `emoe.families.FamilySpec.layout` gives them."""
    emoe_source: dict | None = None
    """What the source's config.json had in fields that this one replaces: family (its model_type), architectures."""
    emoe_provenance: dict | None = None
    """Who made it: version, source and its digest, split, calibration, seed."""

    on_create = None
    """Called with each new configuration; the installed package registers the model classes of its family there."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.on_create is not None:
            self.on_create(self)
        self.emoe_layers = list(self.emoe_layers or [])
        self.emoe_ffn = dict(self.emoe_ffn or {})
        if self.emoe_groups is not None:
            self._check_groups()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}"
            )

    def _check_groups(self) -> None:
        if len(self.emoe_groups) != len(self.emoe_layers) or not self.emoe_expert_size:
            raise ValueError("emoe_groups needs one entry for each of emoe_layers, and emoe_expert_size")
        if any(not group or group[0] < 1 or min(group) < 0 for group in self.emoe_groups):
            raise ValueError("emoe_groups: every layer needs at least one expert in its budget")
        if max(group[0] for group in self.emoe_groups) != self.num_experts:
            raise ValueError(f"num_experts={self.num_experts} must be the largest budget group of emoe_groups")


def _config_class(name: str) -> type:
    stock = getattr(transformers, name.removeprefix(PREFIX))
    fields = {key: value for key, value in vars(EMoEFields).items() if key in EMoEFields.__annotations__}
    namespace = {
        **fields,
        "__annotations__": dict(EMoEFields.__annotations__),
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with the fields of `EMoEFields`.",
        "model_type": f"emoe_{stock.model_type}",
    }
    return type(name, (EMoEFields, stock), namespace)


def __getattr__(name: str) -> type:
    if not (name.startswith(PREFIX) and name.endswith("Config")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _config_class(name)
    return globals()[name]
