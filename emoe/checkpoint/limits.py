"""Sizes that no model has: refused from config.json, before transformers makes lists or tables of that length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emoe.errors import UserError, shortened

_WIDTH = 1 << 20
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 10_000),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_dim", "head_dim"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "rotary_dim", "num_attention_heads", "num_key_value_heads"), _WIDTH),
    **dict.fromkeys(("n_head", "num_heads", "num_labels", "num_experts", "type_vocab_size"), _WIDTH),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "window_size"), 1 << 28),
}
"""Largest value taken for a field of config.json, some ten times what the largest known models have."""


def check_sizes(config: dict[str, Any], path: Path, flag: str = "--model") -> None:
    """Raise `UserError` when a field of config.json is larger than any model's."""
    for key, largest in LARGEST.items():
        value = config.get(key)
        if isinstance(value, int | float) and not -largest <= value <= largest:
            raise UserError(f"{flag}: {path} says {key}={shortened(value)}, no model has that; do not trust it")
