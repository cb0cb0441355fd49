"""Qwen2-MoE: some layers may stay dense, some experts may be shared. The only stock format for a partial conversion.

It takes a softmax over all E logits, then the K largest, then divides by their sum. Equal weights need logits close
together, and close logits round into ties: `SOFTMAX_SPREAD` weighs one against the other. Shared experts stand behind a
sigmoid gate, which a row of zeros sets to one half; their output matrix is doubled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emoe.exporting import stock
from emoe.exporting.source import Source
from emoe.exporting.spec import Capabilities, Cost, Format, Progress, load_stock

CAN = Capabilities(partial=True, shared=True, query_bias=True)


def cost(source: Source) -> Cost:
    """Router and the shared experts' gate in each converted layer."""
    entries = (source.num_experts - source.shared + 1) * source.reader.config.hidden_size
    return Cost(source.moe_nbytes(entries), stock.softmax_first_exactness(source))


def write(source: Source, folder: Path, progress: Progress) -> dict[str, Any]:
    """Tensors under the names of Qwen's own checkpoints: an expert is three matrices."""
    neurons, shared = source.neurons, source.shared
    chosen = source.top_k - shared

    def layer(index: int) -> dict[str, torch.Tensor]:
        experts = source.experts(index)
        router_ED = source.table(index).weight_ED[shared:]
        found = {
            "mlp.gate.weight": stock.softmax_first(router_ED, source, index),
            "mlp.shared_expert_gate.weight": torch.zeros(1, router_ED.shape[1]),
            "mlp.shared_expert.gate_proj.weight": experts.gate_ESD[:shared].flatten(0, 1),
            "mlp.shared_expert.up_proj.weight": experts.up_ESD[:shared].flatten(0, 1),
            "mlp.shared_expert.down_proj.weight": 2 * torch.cat([*experts.down_EDS[:shared]], dim=1)
            if shared
            else experts.down_EDS.new_zeros(router_ED.shape[1], 0),
        }
        for e in range(shared, source.num_experts):
            name = f"mlp.experts.{e - shared}"
            found[f"{name}.gate_proj.weight"] = experts.gate_ESD[e]
            found[f"{name}.up_proj.weight"] = experts.up_ESD[e]
            found[f"{name}.down_proj.weight"] = experts.down_EDS[e].float() * chosen
        return found

    config = {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": source.reader.hidden_width,
        "moe_intermediate_size": neurons,
        "shared_expert_intermediate_size": shared * neurons,
        "num_experts": source.num_experts - shared,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": source.dense_layers,
        "qkv_bias": source.biases("q_proj", "k_proj", "v_proj"),
        "use_sliding_window": False,
    }
    stock.write(source, folder, config, layer, progress)
    return {"layers": len(source.layers)}


FORMAT = Format(
    name="qwen2_moe",
    routes=True,
    refusal=lambda source: stock.refusal(source, "qwen2_moe", CAN),
    cost=cost,
    write=write,
    load=load_stock,
    tolerance=stock.SOFTMAX_TOLERANCE,
    margin=stock.SOFTMAX_MARGIN,
)
