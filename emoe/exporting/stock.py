"""What the stock mixture-of-experts formats have in common: refusals, config fields, and the loop over layers.

All of them are Llama's decoder with another FFN, so that attention, norms and embeddings keep names and values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.companions import copy_companions
from emoe.checkpoint.writer import ShardWriter
from emoe.exporting.source import Source, Table, dtype_name
from emoe.exporting.spec import Capabilities, Progress
from emoe.exporting.verify import auto_class
from emoe.gating import SOFTMAX
from emoe.runtime import write_text

FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose decoder differs from the stock formats' by the FFN alone."""

SILU = ("silu", "swish")
"""transformers' names of it."""

RAW_SCALE = 2.0**-40
"""Factor on routers that choose by raw logits and weigh by a softmax over the chosen: a power of two keeps the order,
and the weights come out equal to the last bit (2^-16 leaves them 1e-4 apart)."""

DECODER_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "attention_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters"),
)


def refusal(source: Source, name: str, can: Capabilities) -> str | None:
    """Why a stock format cannot represent this model, with the flags that would help; None when it can."""
    reader, config = source.reader, source.config
    again = "convert it again with"
    discriminant = config["emoe_gate"] == "discriminant"
    kept = config["emoe_gate"] in ("average-key", SOFTMAX)  # by formats without a bias for the router
    ways = [
        (source.operated, "experts were taken away or added since its conversion; use --to dense"),
        (
            reader.spec.model_type not in FAMILIES,
            f"the decoder of {reader.spec.model_type} is not {name}'s (only {', '.join(FAMILIES)}); use --to dense",
        ),
        (
            reader.prefix != f"{reader.spec.base_prefix}." or auto_class(source) != "AutoModelForCausalLM",
            "the model has no language head; use --to dense",
        ),
        (
            source.written == torch.float16,
            "float16 has no room for the router's factors; add --dtype bfloat16 or --dtype float32",
        ),
        (
            any(kind == "bias" for _, kind in reader.ffn_tensors(0).values()),
            "its FFN has biases, which the experts of this format have not; use --to dense",
        ),
        (
            not can.activation and activation(source) not in SILU,
            f"its FFN's activation is {activation(source)}, {name} computes SiLU whatever config.json says; "
            + ("" if kept else f"use --to dense, or {again} --gate average-key and ")
            + f"use --to {'qwen2_moe' if source.dense_layers else 'granitemoe'}",
        ),
        (
            config["emoe_gate"] not in ("average-key", "discriminant", SOFTMAX),
            f"gate '{config['emoe_gate']}' is not linear; {again} --gate discriminant (for gpt_oss) or "
            "--gate average-key",
        ),
        (
            bool(source.dense_layers) and not can.partial,
            f"{len(source.dense_layers)} of {reader.num_layers} layers are dense, in {name} all have experts; "
            + (f"{again} --gate average-key and " if discriminant else "")
            + f"use --to qwen2_moe, or {again} --layers all",
        ),
        (
            discriminant and not can.router_bias,
            f"gate 'discriminant' has a bias, which routers of {name} have not; "
            + ("" if source.dense_layers else "use --to gpt_oss, ")
            + f"{training(source)}, or {again} --gate average-key",
        ),
        (
            source.varies,
            f"the number of experts differs by token or layer (routing '{config.get('emoe_routing')}', allocation "
            f"'{config.get('emoe_allocation')}'), in {name} it is fixed; {again} --routing top-k --allocation uniform, "
            f"or accept other routing with --fix-k {source.top_k}",
        ),
        (
            bool(source.shared) and not can.shared,
            f"{source.shared} experts are always chosen, which {name} cannot say; use --to qwen2_moe, or {again} "
            "--shared-experts 0",
        ),
        (
            source.weighs and source.top_k == source.num_experts,
            "with all experts on its gate is not asked, a stock router weighs them all the same; use --to dense, or "
            "--fix-k with fewer",
        ),
        (
            bool(source.shared) and source.top_k <= source.shared,
            f"all {source.top_k} experts of a token are shared ones, none is left to choose; add --fix-k with more",
        ),
        (
            bool(config.get("emoe_compensation")) and not can.compensation,
            f"the mean of skipped experts is added, for which {name} has no place; use --to gpt_oss, or convert it "
            "again without --compensate",
        ),
        (
            source.biases("q_proj", "k_proj", "v_proj") and not can.query_bias,
            f"its attention has biases, {name}'s has none; use --to qwen2_moe or granitemoe",
        ),
        (
            source.biases("o_proj") and not can.output_bias,
            f"its attention's output has a bias, {name}'s has none; use --to granitemoe",
        ),
        (
            has_window(reader.config) and not can.window,
            f"its attention looks back through a window, {name}'s does not; use --to mixtral or gpt_oss",
        ),
        (
            not can.lossless and not source.weighs and not source.approximate,
            f"{name} takes a softmax before it chooses: weights alike enough for the sum round near-ties away, so that "
            f"tokens would get other experts; use --to granitemoe, {training(source)}, or accept and measure it with "
            "--approximate",
        ),
    ]
    return next((why for wrong, why in ways if wrong), None)


def training(source: Source) -> str:
    """In words, how a model gets gates that every stock format has."""
    routing = (source.config.get("emoe_routing", "top-k"), source.config.get("emoe_allocation", "uniform"))
    first = "" if routing == ("top-k", "uniform") else "convert it with --routing top-k --allocation uniform and "
    return f"{first}train other gates (emoe recover --gates softmax)"


def activation(source: Source) -> str:
    """The FFN's activation by transformers' name."""
    return getattr(source.reader.config, source.reader.spec.activation_key)


def layer_types(config: Any) -> list[str]:
    """Each layer's attention, "sliding_attention" or "full_attention"."""
    if hasattr(type(config), "layer_types"):  # Qwen2 has some layers slide; Mistral does not read such a list
        return config.layer_types
    slides = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers


def has_window(config: Any) -> bool:
    """Whether attention looks back through a window in some layer."""
    return "sliding_attention" in layer_types(config)


def decoder_fields(source: Source) -> dict[str, Any]:
    """The config fields that all stock formats share with Llama."""
    config = source.reader.config
    found = {name: getattr(config, name) for name in DECODER_FIELDS if getattr(config, name, None) is not None}
    found.setdefault("head_dim", config.hidden_size // config.num_attention_heads)
    found["dtype"] = dtype_name(source.written)
    return found


def write(
    source: Source,
    folder: Path,
    config: dict[str, Any],
    layer: Callable[[int], dict[str, torch.Tensor]],
    progress: Progress,
) -> None:
    """Shards, a layer at a time, config.json and companions. `layer` gives what takes the place of a converted FFN, by
    name within the layer; scaled routers and factors are in fp32 and are cast here."""
    reader = source.reader
    writer = ShardWriter(folder, reader.num_layers + 1)
    writer.write(0, source.outside())
    for index in range(reader.num_layers):
        progress("writing", index, reader.num_layers)
        tensors = source.rest(index)
        if index in source.partition.labels:
            made = layer(index)
            tensors |= {reader.layer_prefix(index) + name: tensor.to(source.written) for name, tensor in made.items()}
        writer.write(index + 1, tensors, wait=False)
    writer.flush()
    writer.finish()
    full = decoder_fields(source) | config
    write_text(folder / "config.json", json.dumps(full, indent=2, sort_keys=True) + "\n")
    copy_companions(source.folder, folder)
    progress("done", reader.num_layers, reader.num_layers)


def raw_router(source: Source, index: int) -> Table:
    """A router for formats that choose by raw logits: the gate's own where its softmax weighs the experts, and times
    `RAW_SCALE` where they are to get weights alike."""
    table = source.table(index)
    if source.weighs:
        return table
    return Table(table.weight_ED * RAW_SCALE, None if table.bias_E is None else table.bias_E * RAW_SCALE)


SOFTMAX_SPREAD = 2.0**-11
"""Standard deviation of a token's logits behind `softmax_first`, a compromise: weights of the chosen are then unequal
by about this share, and logits closer than 2^-13 of a standard deviation are ties. `scripts/measure_spread.py` finds
where the sum of both losses is least, on text that no export is judged on: SmolLM2, layers 26 and 28, 32 of 64 experts,
2k tokens each of corpus:essays and corpus:german, 2^-10.9 twice (1.0e-5 and 2.6e-5 nats); all layers, 56 of 64, 512
tokens of corpus:essays, 2^-10.5 (3.9e-4)."""

SOFTMAX_TOLERANCE = 1e-3
"""`Format.tolerance` of formats that weigh so: on the same choices, 3e-6 to 7e-5 nats (a·s² of that script)."""

SOFTMAX_MARGIN = 0.1
"""`Format.margin` of these formats: near-ties, not errors."""


def softmax_first(router_ED: torch.Tensor, source: Source, index: int) -> torch.Tensor:
    """A router for formats that take the softmax before the choice: the gate's own where its softmax weighs the experts
    (divided by the sum over the chosen, a softmax over all is one over the chosen), else scaled to `SOFTMAX_SPREAD`.

    The spread is estimated from the layer's own RMSNorm, whose output has entries of the size of its weights.
    """
    if source.weighs:
        return router_ED
    name = f"{source.reader.layer_prefix(index)}post_attention_layernorm.weight"
    norm_D = source.reader.read([name])[name].float()
    centred_ED = router_ED - router_ED.mean(0)  # what all experts have in common does not change a softmax
    spread = (centred_ED * norm_D).square().sum(1).mean().sqrt()
    return centred_ED * (SOFTMAX_SPREAD / spread.clamp_min(1e-30))


def softmax_first_exactness(source: Source) -> str:
    """What `softmax_first` costs, in words."""
    if source.weighs:
        return raw_exactness(source)
    found = "not exact: a softmax before the choice; weights of the chosen differ by parts in a thousand, near-ties "
    found += "may go to other experts"
    many = f", many of them in 16 bits: --dtype float32 keeps them apart; {_rounding(source)}"
    return found + (many if source.narrow else "")


def raw_exactness(source: Source) -> str:
    """What formats cost that choose by the model's own logits, in words."""
    if source.narrow:
        name = dtype_name(source.written)
        found = f"router and logits in {name}, so that near-ties go to other experts: --dtype float32 keeps them apart"
        return f"{found}; {_rounding(source)}"
    found = "same experts chosen from the same logits, "
    found += "weighed by the same softmax" if source.weighs else "weights equal to the last bit"
    return f"{found}; output matrices are times {source.top_k}"


def _rounding(source: Source) -> str:
    """What 16 bits do to the weights."""
    return f"output matrices are times {source.top_k}, rounded; other weights {source.fidelity}"
