"""What the converter must know of a model family, as data: where the FFN lives and how its weights are stored.

Legend: D model width, F hidden width of the FFN (its neurons), E experts, S = F // E neurons per expert.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FamilySpec:
    """One family. Module names are relative: `layers` to the base model, `ffn` to a layer, the rest to the FFN."""

    model_type: str
    """``model_type`` of the stock config.json, as in transformers."""
    base_prefix: str
    """Prefix of the base model inside a model with a head (transformers' ``base_model_prefix``)."""
    layers: str
    """Path of the list of layers inside the base model."""
    up: str
    """Linear from D to F. Of a fused matrix: the one of shape (2F, D), gate rows first, then up rows."""
    down: str
    """Linear from F to D."""
    gate: str | None = None
    """Linear from D to F under the activation (SwiGLU, GeGLU); None in a plain FFN and in a fused one."""
    fused: bool = False
    """Gate and up are one matrix (`up`)."""
    ffn: str = "mlp"
    """Module that holds the linears; empty when they lie in the layer itself."""
    host: str = "module"
    """Where the FFN's arithmetic is written in transformers: "module" (the forward of `ffn`), "bert-layer"
    (``feed_forward_chunk`` of the layer) or "opt-layer" (inline in the layer's forward)."""
    transposed: bool = False
    """Weights are stored (in, out), as GPT-2's Conv1D does, instead of Linear's (out, in)."""
    dropout: str | None = None
    """Dropout module that the FFN applies to its own output."""
    activation_key: str = "hidden_act"
    """Config field that names the activation."""
    width_keys: tuple[str, ...] = ("intermediate_size",)
    """Config fields tried in turn for F; when all are absent or null, F = 4 D (GPT-2's rule)."""
    layer_returns_tuple: bool = False
    """The stock layer returns (hidden, attention weights) instead of the hidden states."""
    old_spellings: tuple[tuple[str, str], ...] = ()
    """(spelling in transformers 5, another one found in checkpoints) of parts of parameter names."""
    position_offset: int = 0
    """Places of the position table that no token can take (RoBERTa counts from its padding index on)."""
    adds_output: bool = True
    """The layer adds the FFN's output to the residual stream as it is, with no norm between or behind."""
    encoder: bool = False
    """Bidirectional: quality is masked-LM loss instead of perplexity."""

    @property
    def gated(self) -> bool:
        """Whether the FFN is act(gate(x)) * up(x) rather than act(up(x))."""
        return self.gate is not None or self.fused

    @property
    def key(self) -> str:
        """Linear whose rows are the neurons' keys (EMoE, section 3.1: the matrix under the activation)."""
        return self.gate or self.up

    def hidden_width(self, config: Any) -> int:
        """F of a stock config object, before any weight is read."""
        for name in self.width_keys:
            if getattr(config, name, None):
                return getattr(config, name)
        return 4 * config.hidden_size

    def width_key(self, raw_config: dict[str, Any]) -> str:
        """The field of a config.json that says F, or may say it."""
        return next((name for name in self.width_keys if raw_config.get(name)), self.width_keys[0])

    def spellings(self, name: str) -> tuple[str, ...]:
        """A parameter's name in transformers and the other ways in which checkpoints spell it."""
        others = (name.replace(new, old) for new, old in self.old_spellings if new in name)
        return (name, *others)

    def layout(self) -> dict[str, Any]:
        """The part that a converted model needs at run time; stored as ``emoe_ffn`` in its config.json."""
        wanted = ("layers", "ffn", "host", "gate", "up", "down", "fused", "dropout", "activation_key")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in wanted}
