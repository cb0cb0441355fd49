"""A tiny ModuleFormer, and a converted model that leaves experts alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_tokenizer

import emoe
from emoe.checkpoint.digests import write_digests

MODULEFORMER = {
    **{"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 2, "att_hidden": 16, "ffd_hidden": 24},
    **{"gating_size": 16, "n_att_experts": 6, "n_mlp_experts": 8, "k_att": 2, "k_mlp": 3, "block_size": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def moduleformer(folder: Path, gate_type: str) -> Path:
    """A random ModuleFormer with a tokenizer, saved; weights are large enough for experts to matter."""
    torch.manual_seed(0)
    model = emoe.ModuleFormerForCausalLM(emoe.ModuleFormerConfig(gate_type=gate_type, **MODULEFORMER))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def starve(folder: Path, experts: list[int], layers: list[int]) -> None:
    """Make a discriminant gate never choose these experts in these layers, whatever the token."""
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("router.bias") and any(f".{layer}." in name for layer in layers):
                tensors[name][experts] = -1e4
        save_file(tensors, path, metadata={"format": "pt"})
    write_digests(folder)
