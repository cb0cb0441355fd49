"""IBM's GraniteMoE: the K largest raw logits, then a softmax over them.

A router times 2^-40 keeps its order and makes that softmax 1/K for each; output matrices times K give back the sum with
weight 1. Granite's four multipliers are set so that the decoder is Llama's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emoe.exporting import stock
from emoe.exporting.source import Source
from emoe.exporting.spec import Capabilities, Cost, Format, Progress, load_stock

CAN = Capabilities(query_bias=True, output_bias=True)


def cost(source: Source) -> Cost:
    """The router is new; it has E rows of D in each layer."""
    router = source.num_experts * source.reader.config.hidden_size
    return Cost(source.moe_nbytes(router), stock.raw_exactness(source))


def write(source: Source, folder: Path, progress: Progress) -> dict[str, Any]:
    """Tensors under the names of IBM's own checkpoints, which transformers and other runtimes read."""
    biased = source.biases("q_proj", "k_proj", "v_proj", "o_proj")
    decoder = stock.decoder_fields(source)

    def layer(index: int) -> dict[str, torch.Tensor]:
        experts, table = source.experts(index), stock.raw_router(source, index)
        found = {
            "block_sparse_moe.router.layer.weight": table.weight_ED,
            "block_sparse_moe.input_linear.weight": torch.cat([experts.gate_ESD, experts.up_ESD], dim=1),
            "block_sparse_moe.output_linear.weight": experts.down_EDS.float() * source.top_k,
        }
        if biased and not source.biases("o_proj"):  # Qwen2 has biases in three of the four projections
            found["self_attn.o_proj.bias"] = torch.zeros(source.reader.config.hidden_size)
        return found

    config = {
        "model_type": "granitemoe",
        "architectures": ["GraniteMoeForCausalLM"],
        "intermediate_size": source.neurons,
        "num_local_experts": source.num_experts,
        "num_experts_per_tok": source.top_k,
        "attention_bias": biased,
        "attention_multiplier": decoder["head_dim"] ** -0.5,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }
    stock.write(source, folder, config, layer, progress)
    return {"layers": len(source.layers)}


FORMAT = Format(
    name="granitemoe",
    routes=True,
    refusal=lambda source: stock.refusal(source, "granitemoe", CAN),
    cost=cost,
    write=write,
    load=load_stock,
)
