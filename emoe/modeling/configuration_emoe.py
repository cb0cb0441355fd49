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
    """How experts are chosen: "average-key", "representative", "discriminant" or, trained, "cosine"."""
    emoe_routing: str = "top-k"
    """How many experts a token gets: "top-k" (K), "threshold" or "energy-share" (as many as it needs, K on average); as
    ablations of top-k: "bottom-k" and "random"."""
    emoe_allocation: str = "uniform"
    """How the budget K is shared among layers: "uniform", or "sensitivity" (each layer its own, K on average)."""
    emoe_shared_experts: int = 0
    """The first so many experts are always chosen, and count towards K."""
    emoe_compensation: int = 0
    """Budget K at which routers hold the mean output of skipped experts, which is added; 0 for none."""
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
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}"
            )


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
