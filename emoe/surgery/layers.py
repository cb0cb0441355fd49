"""config.json of a stock family when some of its layers go: their number, and what depends on a layer's number."""

from __future__ import annotations

from typing import Any

from emoe.errors import UserError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
"""Names of the number of layers in config.json."""


def renumbered(raw: dict[str, Any], stock: Any, kept: list[int]) -> dict[str, Any]:
    """config.json when only the layers ``kept`` (ascending) stay, each with the attention that it had.

    Args:
        raw: config.json as it is; it may leave out what transformers derives from a layer's number.
        stock: the family's configuration object of it, where that is spelt out.

    Raises:
        UserError: attention that depends on the layer's number in a way that no field can say.
    """
    if getattr(stock, "scale_attn_by_inverse_layer_idx", False) and kept != list(range(len(kept))):
        raise UserError(
            "--method: this model divides attention by the layer's number (scale_attn_by_inverse_layer_idx), so its "
            "layers cannot move; use layers-top"
        )
    changed: dict[str, Any] = {key: len(kept) for key in LAYER_COUNTS if key in raw}
    if types := getattr(stock, "layer_types", None):  # by sliding_window_pattern, max_window_layers or none of a field
        changed["layer_types"] = [types[layer] for layer in kept]
    if getattr(stock, "attention_types", None):  # GPT-Neo: [[kinds, how often]], and the same spelt out
        kinds = [stock.attention_layers[layer] for layer in kept]
        changed |= {"attention_types": [[kinds, 1]], "attention_layers": kinds}
    return raw | changed
