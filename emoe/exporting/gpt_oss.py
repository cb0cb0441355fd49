"""OpenAI's GPT-OSS: raw logits with a bias, K largest, softmax over them; experts with biases. Takes the default gate.

Its FFN computes (up + 1) · gate · σ(α · gate) with both clamped. With ``swiglu_alpha`` 1 and a limit beyond reach that
is (up + 1) · SiLU(gate); a bias of -1 on ``up`` takes the 1 away. The up projection is times 2^20, the output smaller
by as much, so that what rounds off beside the 1 is nothing. Attention's sinks are so low that softmax gives them 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emoe.exporting import stock
from emoe.exporting.source import Source
from emoe.exporting.spec import Capabilities, Cost, Format, Progress, load_stock

CAN = Capabilities(
    router_bias=True, compensation=True, query_bias=True, output_bias=True, window=True, activation=False
)
UP_SCALE = 2.0**20
NO_LIMIT = 1e30
NO_SINK = -1e4
"""exp(NO_SINK - any logit) is 0 in every element type."""


def cost(source: Source) -> Cost:
    """Router, its bias, three biases of each expert, and a sink for each attention head."""
    config, biases = source.reader.config, 2 * source.neurons + source.reader.config.hidden_size + 1
    layer = source.num_experts * (config.hidden_size + biases) + config.num_attention_heads
    exact = stock.raw_exactness(source)
    exact += "; needs a runtime that reads swiglu_alpha and swiglu_limit, as transformers 5.23 does; attention 'eager'"
    return Cost(source.moe_nbytes(layer), exact)


def write(source: Source, folder: Path, progress: Progress) -> dict[str, Any]:
    """Tensors under transformers' own names, gate and up rows in turn."""
    config, experts_count = source.reader.config, source.num_experts
    neurons = source.neurons
    biased = source.biases("q_proj", "k_proj", "v_proj", "o_proj")
    # transformers makes that mask even if no layer asks
    window = config.sliding_window if stock.has_window(config) else config.max_position_embeddings

    def layer(index: int) -> dict[str, torch.Tensor]:
        experts, table = source.experts(index), stock.raw_router(source, index)
        bias_E = table.bias_E if table.bias_E is not None else torch.zeros(experts_count)
        up_ESD = experts.up_ESD.float() * UP_SCALE
        rows_EDH = torch.stack([experts.gate_ESD.float(), up_ESD], dim=2).flatten(1, 2).transpose(1, 2)
        constant_D = source.compensation(index)
        constant_D = torch.zeros(config.hidden_size) if constant_D is None else constant_D
        found = {
            "mlp.router.weight": table.weight_ED,
            "mlp.router.bias": bias_E,
            "mlp.experts.gate_up_proj": rows_EDH,
            "mlp.experts.gate_up_proj_bias": torch.tensor([0.0, -1.0]).repeat(experts_count, neurons),
            "mlp.experts.down_proj": experts.down_EDS.transpose(1, 2).float() * (source.top_k / UP_SCALE),
            "mlp.experts.down_proj_bias": constant_D.repeat(experts_count, 1),  # weights 1/K of K chosen: once in all
            "self_attn.sinks": torch.full((config.num_attention_heads,), NO_SINK),
        }
        if biased and not source.biases("o_proj"):
            found["self_attn.o_proj.bias"] = torch.zeros(config.hidden_size)
        return found

    fields = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": neurons,
        "num_local_experts": experts_count,
        "num_experts_per_tok": source.top_k,
        "attention_bias": biased,
        "swiglu_alpha": 1.0,
        "swiglu_limit": NO_LIMIT,
        "sliding_window": window,
        "layer_types": stock.layer_types(config),
    }
    stock.write(source, folder, fields, layer, progress)
    return {"layers": len(source.layers)}


FORMAT = Format(
    name="gpt_oss",
    routes=True,
    refusal=lambda source: stock.refusal(source, "gpt_oss", CAN),
    cost=cost,
    write=write,
    load=load_stock,
)
